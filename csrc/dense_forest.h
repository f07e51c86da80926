// Forests of trees so shallow that most neurons are visited: all of them by dense products, and the
// paths as a mask. The same function as the walk, up to rounding.
#pragma once

#include "check.h"

namespace fff {

// Whether dense products are the faster way; `straight_through` matters in backward only.
bool suits_dense_forest(const TreeForward& p, const at::Tensor& x, bool straight_through);

// Fills p.scores and p.leaf; the output, [tokens, output_width]. x is [tokens, input_width], the
// others as in `tree`.
at::Tensor dense_forest(const TreeForward& p, const at::Tensor& x, const at::Tensor& node_weight,
                        const OptionalTensor& node_bias, const at::Tensor& node_output);

struct DenseForestGradients {
  at::Tensor x, node_weight, node_bias, node_output;  // empty where not wanted
};

// p.grad_scores, p.scores and p.leaf are read; grad_output is [tokens, output_width].
DenseForestGradients dense_forest_backward(const TreeBackward& p, const at::Tensor& grad_output,
                                           const at::Tensor& x, const at::Tensor& node_weight,
                                           const at::Tensor& node_output, bool wants_x,
                                           bool wants_nodes);

}  // namespace fff
