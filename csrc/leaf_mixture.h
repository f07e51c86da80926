// The leaf mixture of a soft tree and its gradient.
#pragma once

#include <ATen/core/Tensor.h>

namespace fff {

// node_logits [..., 2^d - 1] -> mixture [..., 2^d]
at::Tensor leaf_mixture(const at::Tensor& node_logits);

// -> gradient of node_logits
at::Tensor leaf_mixture_backward(const at::Tensor& grad_mixture, const at::Tensor& node_logits,
                                 const at::Tensor& mixture);

}  // namespace fff
