#include "check.h"

#include <c10/util/StringUtil.h>

#include <bit>

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

int Check::levels(const at::Tensor& node_weight, int64_t trees) const {
  TORCH_CHECK(trees >= 1, op_, ": trees must be at least 1, got ", trees);
  TORCH_CHECK(node_weight.dim() == 2, op_,
              ": node_weight must have shape [trees * nodes, input_width], got ",
              node_weight.sizes());
  const int64_t rows = node_weight.size(0);
  const uint64_t leaves = static_cast<uint64_t>(rows / trees) + 1;
  TORCH_CHECK(rows % trees == 0 && std::has_single_bit(leaves), op_,
              ": node_weight must have trees * (2^levels - 1) rows with trees = ", trees, ", got ",
              rows);
  return std::countr_zero(leaves);
}

}  // namespace fff
