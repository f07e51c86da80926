// The leaf networks of soft trees, mixed, without the leaves whose weight is below a threshold; and
// the gradient. Weights of leaves are numbered over all trees.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <string_view>
#include <tuple>

#include "check.h"

namespace fff {

// x [..., in], mixture [..., trees, leaves], w1 [trees * leaves, l, in], b1 [trees * leaves, l],
// w2 [trees * leaves, l, out], b2 [trees * leaves, out] -> [..., out]: the sum over the leaves that
// count of mixture * (activation(x w1^T + b1) w2 + b2). Those count whose weight is at least
// `prune` or the largest of its token and tree.
at::Tensor sparse_leaves(const at::Tensor& x, const at::Tensor& mixture, const at::Tensor& w1,
                         const OptionalTensor& b1, const at::Tensor& w2, const OptionalTensor& b2,
                         double prune, std::string_view activation);

// Gradients of x, mixture, w1, b1, w2, b2.
using SparseLeavesGradients =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// output_mask: whether x, and whether the weights, want a gradient.
SparseLeavesGradients sparse_leaves_backward(const at::Tensor& grad_output, const at::Tensor& x,
                                             const at::Tensor& mixture, const at::Tensor& w1,
                                             const OptionalTensor& b1, const at::Tensor& w2,
                                             const OptionalTensor& b2, double prune,
                                             std::string_view activation,
                                             std::array<bool, 2> output_mask);

}  // namespace fff
