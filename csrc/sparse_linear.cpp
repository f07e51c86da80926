#include "sparse_linear.h"

#include <ATen/ops/count_nonzero.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "check.h"
#include "cpu/kernels.h"
#include "row_pairs.h"

namespace fff {
namespace {

// Up to this share of nonzero elements the sums over them are faster than two matrix products.
constexpr double kSparseShare = 0.125;

}  // namespace

std::tuple<at::Tensor, at::Tensor> sparse_linear_backward(const at::Tensor& grad_output,
                                                          const at::Tensor& x,
                                                          const at::Tensor& weight,
                                                          std::array<bool, 2> output_mask) {
  const Check check("fff::sparse_linear_backward");
  const DType dtype = check.dtype(x, "x");
  TORCH_CHECK(x.is_cpu(), check.op(), ": x must be on the CPU, got ", x.device());
  TORCH_CHECK(x.dim() >= 1, check.op(), ": x must have shape [..., in], got a scalar");
  TORCH_CHECK(weight.dim() == 2 && weight.size(1) == x.size(-1), check.op(),
              ": weight must have shape [rows, ", x.size(-1), "], got ", weight.sizes());
  check.same(weight, "weight", x, x.scalar_type());
  at::DimVector sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = weight.size(0);
  check.same(grad_output, "grad_output", x, x.scalar_type());
  check.shape(grad_output, "grad_output", sizes);

  SparseLinearBackward p = {};
  p.tokens = c10::multiply_integers(x.sizes().slice(0, x.dim() - 1));
  p.rows = weight.size(0);
  p.width = weight.size(1);
  p.dtype = dtype;
  const at::Tensor g = grad_output.contiguous().view({p.tokens, p.rows});
  const at::Tensor tokens = x.contiguous().view({p.tokens, p.width});
  const auto [of_x, of_weight] = output_mask;
  const auto none = [&] { return at::empty({0}, x.options()); };
  const auto nonzero = static_cast<double>(at::count_nonzero(g).item<int64_t>());
  if (nonzero > kSparseShare * static_cast<double>(g.numel())) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    return {of_x ? at::mm(g, weight).view(x.sizes()) : none(),
            of_weight ? at::mm(g.t(), tokens) : none()};
  }
  const at::Tensor own_weight = weight.contiguous();
  const at::Tensor grad_x = of_x ? at::empty(x.sizes(), x.options()) : none();
  const auto acc = x.options().dtype(accumulation_type(x.scalar_type()));
  const at::Tensor grad_weight = of_weight ? at::zeros(weight.sizes(), acc) : none();
  const RowPairs pairs = of_weight ? nonzero_pairs(g) : RowPairs();
  p.grad_output = g.data_ptr();
  p.x = tokens.data_ptr();
  p.weight = own_weight.data_ptr();
  p.pair_tokens = pairs.tokens.data();
  p.runs = pairs.runs.data();
  p.run_count = static_cast<int64_t>(pairs.runs.size());
  p.grad_x = of_x ? grad_x.data_ptr() : nullptr;
  p.grad_weight = of_weight ? grad_weight.data_ptr() : nullptr;
  cpu::kernels().sparse_linear_backward(p);
  return {grad_x, grad_weight.to(x.scalar_type())};
}

}  // namespace fff
