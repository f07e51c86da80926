#include "check.h"

#include <c10/util/StringUtil.h>

namespace fff {

DType Check::dtype(const at::Tensor& t, const char* argument) const {
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::kFloat;
    case at::kDouble:
      return DType::kDouble;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kHalf;
    default:
      TORCH_CHECK(false, op_, ": ", argument,
                  " must be float32, float64, bfloat16 or float16, got ", t.scalar_type());
  }
}

Activation Check::activation(std::string_view name, const char* argument) const {
  if (name == "identity") {
    return Activation::kIdentity;
  }
  if (name == "relu") {
    return Activation::kRelu;
  }
  if (name == "gelu") {
    return Activation::kGelu;
  }
  if (name == "gelu_tanh") {
    return Activation::kGeluTanh;
  }
  if (name == "silu") {
    return Activation::kSilu;
  }
  TORCH_CHECK_VALUE(false, op_, ": ", argument,
                    " must be one of 'identity', 'relu', 'gelu', 'gelu_tanh', 'silu', got '", name,
                    "'");
}

void Check::same(const at::Tensor& t, const char* argument, const at::Tensor& like,
                 at::ScalarType dtype) const {
  TORCH_CHECK(t.device() == like.device(), op_, ": ", argument, " must be on ", like.device(),
              " like the first tensor, got ", t.device());
  TORCH_CHECK(t.scalar_type() == dtype, op_, ": ", argument, " must be ", dtype, ", got ",
              t.scalar_type());
}

void Check::shape(const at::Tensor& t, const char* argument, at::IntArrayRef expected) const {
  TORCH_CHECK(t.sizes() == expected, op_, ": ", argument, " must have shape ", expected, ", got ",
              t.sizes());
}

void Check::optional(const OptionalTensor& t, const char* argument, const at::Tensor& like,
                     at::ScalarType dtype, at::IntArrayRef expected) const {
  if (defined(t)) {
    same(*t, argument, like, dtype);
    shape(*t, argument, expected);
  }
}

}  // namespace fff
