#include "gated_activation.h"

#include <ATen/ops/empty.h>

#include "check.h"
#include "launch.h"

namespace fff {
namespace {

GatedActivation params_of(const Check& check, const at::Tensor& pre, const at::Tensor& mixture,
                          std::string_view activation) {
  GatedActivation p = {};
  p.dtype = check.dtype(pre, "pre");
  p.activation = check.activation(activation, "activation");
  check.same(mixture, "mixture", pre, pre.scalar_type());
  TORCH_CHECK(
      mixture.dim() >= 1 && mixture.dim() == pre.dim() && mixture.size(-1) >= 1 &&
          pre.size(-1) % mixture.size(-1) == 0 &&
          pre.sizes().slice(0, pre.dim() - 1) == mixture.sizes().slice(0, mixture.dim() - 1),
      check.op(), ": pre must have shape [..., leaves * leaf_width] for mixture [..., ",
      "leaves] = ", mixture.sizes(), ", got ", pre.sizes());
  p.tokens = c10::multiply_integers(pre.sizes().slice(0, pre.dim() - 1));
  p.leaves = mixture.size(-1);
  p.leaf_width = pre.size(-1) / p.leaves;
  return p;
}

}  // namespace

at::Tensor gated_activation(const at::Tensor& pre, const at::Tensor& mixture,
                            std::string_view activation) {
  const Check check("fff::gated_activation");
  GatedActivation p = params_of(check, pre, mixture, activation);
  const at::Tensor own_pre = pre.contiguous();
  const at::Tensor own_mixture = mixture.contiguous();
  at::Tensor output = at::empty(pre.sizes(), pre.options());
  if (output.numel() > 0) {
    p.pre = own_pre.const_data_ptr();
    p.mixture = own_mixture.const_data_ptr();
    p.output = output.data_ptr();
    launch(check.op(), own_pre, p, &cpu::Kernels::gated_activation,
           FFF_CUDA_KERNEL(gated_activation));
  }
  return output;
}

std::tuple<at::Tensor, at::Tensor> gated_activation_backward(const at::Tensor& grad_output,
                                                             const at::Tensor& pre,
                                                             const at::Tensor& mixture,
                                                             std::string_view activation) {
  const Check check("fff::gated_activation_backward");
  GatedActivation p = params_of(check, pre, mixture, activation);
  check.same(grad_output, "grad_output", pre, pre.scalar_type());
  check.shape(grad_output, "grad_output", pre.sizes());
  const at::Tensor own_grad = grad_output.contiguous();
  const at::Tensor own_pre = pre.contiguous();
  const at::Tensor own_mixture = mixture.contiguous();
  at::Tensor grad_pre = at::empty(pre.sizes(), pre.options());
  at::Tensor grad_mixture = at::empty(mixture.sizes(), mixture.options());
  if (grad_pre.numel() > 0) {
    p.pre = own_pre.const_data_ptr();
    p.mixture = own_mixture.const_data_ptr();
    p.grad_output = own_grad.const_data_ptr();
    p.grad_pre = grad_pre.data_ptr();
    p.grad_mixture = grad_mixture.data_ptr();
    launch(check.op(), own_pre, p, &cpu::Kernels::gated_activation_backward,
           FFF_CUDA_KERNEL(gated_activation_backward));
  } else {
    grad_mixture.zero_();
  }
  return {grad_pre, grad_mixture};
}

}  // namespace fff
