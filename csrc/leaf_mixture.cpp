#include "leaf_mixture.h"

#include <ATen/ops/empty.h>

#include <bit>

#include "check.h"
#include "launch.h"

namespace fff {
namespace {

LeafMixture params_of(const Check& check, const at::Tensor& node_logits) {
  TORCH_CHECK(node_logits.dim() >= 1, check.op(),
              ": node_logits must have shape [..., 2^depth - 1], got a scalar");
  const uint64_t leaves = static_cast<uint64_t>(node_logits.size(-1)) + 1;
  TORCH_CHECK(std::has_single_bit(leaves), check.op(),
              ": node_logits must have 2^depth - 1 columns, got shape ", node_logits.sizes());
  LeafMixture p = {};
  p.dtype = check.dtype(node_logits, "node_logits");
  p.depth = std::countr_zero(leaves);
  p.tokens = c10::multiply_integers(node_logits.sizes().slice(0, node_logits.dim() - 1));
  return p;
}

std::vector<int64_t> mixture_shape(const at::Tensor& node_logits) {
  std::vector<int64_t> shape = node_logits.sizes().vec();
  ++shape.back();
  return shape;
}

}  // namespace

at::Tensor leaf_mixture(const at::Tensor& node_logits) {
  const Check check("fff::leaf_mixture");
  LeafMixture p = params_of(check, node_logits);
  const at::Tensor logits = node_logits.contiguous();
  at::Tensor mixture = at::empty(mixture_shape(logits), logits.options());
  if (p.tokens > 0) {
    p.node_logits = logits.const_data_ptr();
    p.mixture = mixture.data_ptr();
    launch(check.op(), logits, p, &cpu::Kernels::leaf_mixture, FFF_CUDA_KERNEL(leaf_mixture));
  }
  return mixture;
}

at::Tensor leaf_mixture_backward(const at::Tensor& grad_mixture, const at::Tensor& node_logits,
                                 const at::Tensor& mixture) {
  const Check check("fff::leaf_mixture_backward");
  LeafMixture p = params_of(check, node_logits);
  const auto shape = mixture_shape(node_logits);
  check.optional(grad_mixture, "grad_mixture", node_logits, node_logits.scalar_type(), shape);
  check.optional(mixture, "mixture", node_logits, node_logits.scalar_type(), shape);
  const at::Tensor logits = node_logits.contiguous();
  const at::Tensor own_grad = grad_mixture.contiguous();
  const at::Tensor own_mixture = mixture.contiguous();
  at::Tensor grad = at::empty(logits.sizes(), logits.options());
  if (p.tokens > 0) {
    p.node_logits = logits.const_data_ptr();
    p.mixture = own_mixture.data_ptr();
    p.grad_mixture = own_grad.const_data_ptr();
    p.grad_node_logits = grad.data_ptr();
    launch(check.op(), logits, p, &cpu::Kernels::leaf_mixture_backward,
           FFF_CUDA_KERNEL(leaf_mixture_backward));
  }
  return grad;
}

}  // namespace fff
