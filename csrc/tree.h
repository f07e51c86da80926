// The hard-tree operators: conditional execution of one path per token and tree, and its gradient.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <string_view>
#include <tuple>

#include "check.h"

namespace fff {

// x [..., input_width] -> output [..., output_width], scores [..., trees, levels], leaf [...,
// trees]; see ops.cpp.
std::tuple<at::Tensor, at::Tensor, at::Tensor> tree(
    const at::Tensor& x, const at::Tensor& node_weight, const OptionalTensor& node_bias,
    const OptionalTensor& node_output, const OptionalTensor& w1, const OptionalTensor& b1,
    const OptionalTensor& w2, const OptionalTensor& b2, const OptionalTensor& noise,
    const OptionalTensor& leaf_scale, const OptionalTensor& alternates, int64_t trees,
    bool tie_right, std::string_view node_activation, std::string_view leaf_activation,
    bool straight_through, double slope, double min_slope, bool row_sparse_grad);

// Gradients of x, node_weight, node_bias, node_output, w1, b1, w2, b2.
using TreeGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                 at::Tensor, at::Tensor, at::Tensor>;

TreeGradients tree_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_scores,
                            const at::Tensor& scores, const at::Tensor& leaf, const at::Tensor& x,
                            const at::Tensor& node_weight, const OptionalTensor& node_bias,
                            const OptionalTensor& node_output, const OptionalTensor& w1,
                            const OptionalTensor& b1, const OptionalTensor& w2,
                            const OptionalTensor& b2, const OptionalTensor& noise,
                            const OptionalTensor& leaf_scale, const OptionalTensor& alternates,
                            int64_t trees, bool tie_right, std::string_view node_activation,
                            std::string_view leaf_activation, bool straight_through, double slope,
                            double min_slope, std::array<bool, 3> output_mask);

// Of the weights only visited rows: the gradient of x, ids of nodes [m] and of leaves [r],
// ascending over all trees, and the gradients of the others with m or r in place of all rows.
using TreeRowGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                    at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

TreeRowGradients tree_backward_rows(
    const OptionalTensor& grad_output, const OptionalTensor& grad_scores, const at::Tensor& scores,
    const at::Tensor& leaf, const at::Tensor& x, const at::Tensor& node_weight,
    const OptionalTensor& node_bias, const OptionalTensor& node_output, const OptionalTensor& w1,
    const OptionalTensor& b1, const OptionalTensor& w2, const OptionalTensor& b2,
    const OptionalTensor& noise, const OptionalTensor& leaf_scale, const OptionalTensor& alternates,
    int64_t trees, bool tie_right, std::string_view node_activation,
    std::string_view leaf_activation, bool straight_through, double slope, double min_slope,
    std::array<bool, 3> output_mask);

// Only the routes: scores [..., trees, levels], leaf [..., trees].
std::tuple<at::Tensor, at::Tensor> descend(const at::Tensor& x, const at::Tensor& node_weight,
                                           const OptionalTensor& node_bias,
                                           const OptionalTensor& noise, int64_t trees,
                                           bool tie_right);

}  // namespace fff
