// activation(pre) * mixture, the hidden layer of a soft tree, and its gradient.
#pragma once

#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>

namespace fff {

// pre [..., leaves * leaf_width], mixture [..., leaves] -> [..., leaves * leaf_width]
at::Tensor gated_activation(const at::Tensor& pre, const at::Tensor& mixture,
                            std::string_view activation);

// -> gradients of pre and mixture
std::tuple<at::Tensor, at::Tensor> gated_activation_backward(const at::Tensor& grad_output,
                                                             const at::Tensor& pre,
                                                             const at::Tensor& mixture,
                                                             std::string_view activation);

}  // namespace fff
