// x weight^T + bias, the products of soft trees and of forests too shallow to walk, and its
// gradients, from whichever library is the faster one; in the dtype of the arguments, under
// autocast too, which may be on in a backward pass alone.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace fff {

// x [tokens, in], weight [out, in], bias [out] -> [tokens, out]
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight,
                  const std::optional<at::Tensor>& bias);

// -> gradients of x, weight and bias; empty where output_mask says that one is not wanted
std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward(const at::Tensor& grad_output,
                                                               const at::Tensor& x,
                                                               const at::Tensor& weight,
                                                               std::array<bool, 3> output_mask);

}  // namespace fff
