#include "sparse_leaves.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "cpu/kernels.h"
#include "row_pairs.h"

namespace fff {
namespace {

// The arguments of one call, checked and made contiguous, tokens in one dimension.
struct Arguments {
  at::Tensor x, mixture, w1, w2;
  OptionalTensor b1, b2;
  SparseLeaves params;
  at::DimVector leading;  // x's dimensions before the last
};

Arguments check_arguments(const Check& check, const at::Tensor& x, const at::Tensor& mixture,
                          const at::Tensor& w1, const OptionalTensor& b1, const at::Tensor& w2,
                          const OptionalTensor& b2, double prune, std::string_view activation) {
  Arguments a;
  SparseLeaves& p = a.params;
  p = {};
  p.dtype = check.dtype(x, "x");
  p.activation = check.activation(activation, "activation");
  const at::ScalarType dtype = x.scalar_type();
  TORCH_CHECK_VALUE(prune >= 0 && prune <= 1, check.op(), ": prune must be in [0, 1], got ", prune);
  TORCH_CHECK(x.is_cpu(), check.op(), ": x must be on the CPU, got ", x.device());
  TORCH_CHECK(x.dim() >= 1, check.op(), ": x must have shape [..., input_width], got a scalar");
  TORCH_CHECK(mixture.dim() == x.dim() + 1 && mixture.size(-2) >= 1 && mixture.size(-1) >= 1 &&
                  mixture.sizes().slice(0, x.dim() - 1) == x.sizes().slice(0, x.dim() - 1),
              check.op(), ": mixture must have shape [..., trees, leaves] for x [..., ",
              "input_width] = ", x.sizes(), ", got ", mixture.sizes());
  TORCH_CHECK(w1.dim() == 3 && w1.size(1) >= 1, check.op(),
              ": w1 must have shape [trees * leaves, leaf_width, input_width], got ", w1.sizes());
  TORCH_CHECK(w2.dim() == 3, check.op(),
              ": w2 must have shape [trees * leaves, leaf_width, output_width], got ", w2.sizes());
  a.leading = at::DimVector(x.sizes().begin(), x.sizes().end() - 1);
  const int64_t trees = mixture.size(-2), leaves = mixture.size(-1);
  TreeShape& s = p.shape;
  s.tokens = c10::multiply_integers(a.leading);
  s.input_width = x.size(-1);
  s.output_width = w2.size(2);
  s.trees = trees;
  s.leaf_width = w1.size(1);
  p.leaves = trees * leaves;
  check.same(mixture, "mixture", x, dtype);
  check.optional(w1, "w1", x, dtype, {p.leaves, s.leaf_width, s.input_width});
  check.optional(b1, "b1", x, dtype, {p.leaves, s.leaf_width});
  check.optional(w2, "w2", x, dtype, {p.leaves, s.leaf_width, s.output_width});
  check.optional(b2, "b2", x, dtype, {p.leaves, s.output_width});

  a.x = x.contiguous().view({s.tokens, s.input_width});
  a.mixture = mixture.contiguous().view({s.tokens, trees, leaves});
  a.w1 = w1.contiguous();
  a.b1 = contiguous(b1);
  a.w2 = w2.contiguous();
  a.b2 = contiguous(b2);
  p.weights = {nullptr,         nullptr,           nullptr, a.w1.data_ptr(), data_or_null(a.b1),
               a.w2.data_ptr(), data_or_null(a.b2)};
  p.x = a.x.data_ptr();
  p.mixture = a.mixture.data_ptr();
  return a;
}

void set_pairs(SparseLeaves& p, const RowPairs& pairs) {
  p.tokens = pairs.tokens.data();
  p.pair_count = static_cast<int64_t>(pairs.tokens.size());
  p.runs = pairs.runs.data();
  p.run_count = static_cast<int64_t>(pairs.runs.size());
}

}  // namespace

at::Tensor sparse_leaves(const at::Tensor& x, const at::Tensor& mixture, const at::Tensor& w1,
                         const OptionalTensor& b1, const at::Tensor& w2, const OptionalTensor& b2,
                         double prune, std::string_view activation) {
  const Check check("fff::sparse_leaves");
  Arguments a = check_arguments(check, x, mixture, w1, b1, w2, b2, prune, activation);
  SparseLeaves& p = a.params;
  at::DimVector sizes = a.leading;
  sizes.push_back(p.shape.output_width);
  const RowPairs pairs = kept_pairs(a.mixture, prune);
  set_pairs(p, pairs);
  const at::Tensor output = at::zeros(sizes, x.options().dtype(accumulation_type(x.scalar_type())));
  p.output = output.data_ptr();
  cpu::kernels().sparse_leaves(p);
  return output.to(x.scalar_type());
}

SparseLeavesGradients sparse_leaves_backward(const at::Tensor& grad_output, const at::Tensor& x,
                                             const at::Tensor& mixture, const at::Tensor& w1,
                                             const OptionalTensor& b1, const at::Tensor& w2,
                                             const OptionalTensor& b2, double prune,
                                             std::string_view activation,
                                             std::array<bool, 2> output_mask) {
  const Check check("fff::sparse_leaves_backward");
  Arguments a = check_arguments(check, x, mixture, w1, b1, w2, b2, prune, activation);
  SparseLeaves& p = a.params;
  at::DimVector sizes = a.leading;
  sizes.push_back(p.shape.output_width);
  const at::ScalarType dtype = x.scalar_type();
  check.same(grad_output, "grad_output", x, dtype);
  check.shape(grad_output, "grad_output", sizes);
  const at::Tensor g = grad_output.contiguous().view({p.shape.tokens, p.shape.output_width});
  const RowPairs pairs = kept_pairs(a.mixture, prune);
  set_pairs(p, pairs);
  const auto options = x.options().dtype(accumulation_type(dtype));
  const auto gradient_of = [&](const OptionalTensor& weight, bool wanted) {
    return defined(weight) && wanted ? at::empty(weight->sizes(), options)
                                     : at::empty({0}, options);
  };
  const auto pointer = [](const at::Tensor& gradient) -> void* {
    return gradient.numel() > 0 ? gradient.data_ptr() : nullptr;
  };
  const auto [of_x, of_leaves] = output_mask;
  const at::Tensor grad_x = of_x ? at::zeros(x.sizes(), options) : at::empty({0}, options);
  const at::Tensor grad_mixture = at::zeros(mixture.sizes(), mixture.options());
  const at::Tensor grad_w1 = gradient_of(w1, of_leaves);
  const at::Tensor grad_b1 = gradient_of(b1, of_leaves);
  const at::Tensor grad_w2 = gradient_of(w2, of_leaves);
  const at::Tensor grad_b2 = gradient_of(b2, of_leaves);
  p.grad_output = g.data_ptr();
  p.grad_x = pointer(grad_x);
  p.grad_mixture = grad_mixture.data_ptr();
  p.grad_w1 = pointer(grad_w1);
  p.grad_b1 = pointer(grad_b1);
  p.grad_w2 = pointer(grad_w2);
  p.grad_b2 = pointer(grad_b2);
  cpu::kernels().sparse_leaves_backward(p);
  return {grad_x.to(dtype),  grad_mixture,      grad_w1.to(dtype),
          grad_b1.to(dtype), grad_w2.to(dtype), grad_b2.to(dtype)};
}

}  // namespace fff
