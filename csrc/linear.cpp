#include "linear.h"

#include <ATen/Context.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "check.h"

namespace fff {
namespace {

// oneDNN's product, where this torch has it.
using OneDnnLinear = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                                std::string_view, c10::List<std::optional<at::Scalar>>,
                                std::optional<std::string_view>);

const std::optional<c10::TypedOperatorHandle<OneDnnLinear>>& onednn_linear() {
  static const auto found = [] {
    const auto handle = c10::Dispatcher::singleton().findSchema({"mkldnn::_linear_pointwise", ""});
    return handle ? std::optional(handle->typed<OneDnnLinear>()) : std::nullopt;
  }();
  return found;
}

// In float32 ATen's own choice is MKL, which on processors that are not Intel's runs at less than
// half of oneDNN's speed; small products are not worth oneDNN's preparations.
bool suits_onednn(const at::Tensor& x, const at::Tensor& weight) {
  constexpr int64_t least_work = int64_t(1) << 21;
  return x.is_cpu() && x.scalar_type() == at::kFloat &&
         x.size(0) * weight.size(0) * weight.size(1) >= least_work &&
         at::globalContext().userEnabledMkldnn() && onednn_linear().has_value();
}

at::Tensor product(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  if (suits_onednn(x, weight)) {
    const c10::List<std::optional<at::Scalar>> no_scalars;
    return onednn_linear()->call(x, weight, bias, "none", no_scalars, "none");
  }
  return at::linear(x, weight, bias);
}

// `x`, copied if it repeats entries, as the gradient of a sum does: oneDNN's products of such
// tensors take a hundred times as long.
at::Tensor without_repeats(const at::Tensor& x) {
  const bool repeats = (x.stride(0) == 0 && x.size(0) > 1) || (x.stride(1) == 0 && x.size(1) > 1);
  return repeats ? x.contiguous() : x;
}

// grad_output^T x with the strides of a transposed or plain weight, so that its owner need not copy
// it into them.
at::Tensor weight_gradient(const at::Tensor& grad_output, const at::Tensor& x,
                           const at::Tensor& weight) {
  const bool transposed = weight.stride(0) == 1 && weight.stride(1) == weight.size(0);
  return transposed ? product(x.t(), grad_output.t(), {}).t() : product(grad_output.t(), x.t(), {});
}

}  // namespace

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) {
  const Check check("fff::linear");
  check.dtype(x, "x");
  TORCH_CHECK(x.dim() == 2, check.op(), ": x must have shape [tokens, in], got ", x.sizes());
  check.same(weight, "weight", x, x.scalar_type());
  TORCH_CHECK(weight.dim() == 2 && weight.size(1) == x.size(1), check.op(),
              ": weight must have shape [out, ", x.size(1), "], got ", weight.sizes());
  check.optional(bias, "bias", x, x.scalar_type(), {weight.size(0)});
  return product(x, weight, bias);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> linear_backward(const at::Tensor& grad_output,
                                                               const at::Tensor& x,
                                                               const at::Tensor& weight,
                                                               std::array<bool, 3> output_mask) {
  const Check check("fff::linear_backward");
  check.dtype(x, "x");
  TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && weight.size(1) == x.size(1), check.op(),
              ": x and weight must have shapes [tokens, in] and [out, in], got ", x.sizes(),
              " and ", weight.sizes());
  check.same(weight, "weight", x, x.scalar_type());
  check.optional(grad_output, "grad_output", x, x.scalar_type(), {x.size(0), weight.size(0)});
  const at::Tensor grad = without_repeats(grad_output);
  const auto absent = [&] { return at::empty({0}, x.options()); };
  const auto [mask_x, mask_weight, mask_bias] = output_mask;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return {mask_x ? product(grad, weight.t(), {}) : absent(),
          mask_weight ? weight_gradient(grad, x, weight) : absent(),
          mask_bias ? grad.sum(0) : absent()};
}

}  // namespace fff
