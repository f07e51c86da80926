// Gradients of a linear layer from an output gradient that may be mostly zero.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>

namespace fff {

// grad_output [..., rows], x [..., in], weight [rows, in] -> gradients of x and weight, each as
// output_mask wants. Where most of grad_output is zero the time is that of the rest.
std::tuple<at::Tensor, at::Tensor> sparse_linear_backward(const at::Tensor& grad_output,
                                                          const at::Tensor& x,
                                                          const at::Tensor& weight,
                                                          std::array<bool, 2> output_mask);

}  // namespace fff
