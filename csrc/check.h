// Argument checks of the operators. Every message names the operator, the argument, what was
// expected and what was got.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "activation.h"
#include "params.h"

namespace fff {

using OptionalTensor = std::optional<at::Tensor>;

// The dtype that scores and sums have: float64 for float64, else float32.
inline at::ScalarType accumulation_type(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

inline bool defined(const OptionalTensor& t) {
  return t.has_value() && t->defined();
}

// Null for an absent tensor.
inline void* data_or_null(const OptionalTensor& t) {
  return defined(t) ? t->data_ptr() : nullptr;
}

inline OptionalTensor contiguous(const OptionalTensor& t) {
  return defined(t) ? OptionalTensor(t->contiguous()) : std::nullopt;
}

// Checks of one operator call; `op` is its name.
class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  DType dtype(const at::Tensor& t, const char* argument) const;
  Activation activation(std::string_view name, const char* argument) const;
  // `t` lies on the device of `like`, the operator's first tensor, and has the given dtype.
  void same(const at::Tensor& t, const char* argument, const at::Tensor& like,
            at::ScalarType dtype) const;
  void shape(const at::Tensor& t, const char* argument, at::IntArrayRef expected) const;
  // `t`, if present, matches device, dtype and shape.
  void optional(const OptionalTensor& t, const char* argument, const at::Tensor& like,
                at::ScalarType dtype, at::IntArrayRef expected) const;
  // Levels of `trees` trees in heap order that share node_weight [trees * (2^levels - 1), in].
  int levels(const at::Tensor& node_weight, int64_t trees) const;
  const char* op() const { return op_; }

 private:
  const char* op_;
};

}  // namespace fff
