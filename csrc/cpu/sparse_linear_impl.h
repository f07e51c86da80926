// Gradients of a linear layer from an output gradient that is mostly zero: per token and per row of
// weights, the sum over what is not.
#pragma once

#include <ATen/Parallel.h>

#include "vec.h"

namespace fff::cpu {
inline namespace CPU_CAPABILITY {

template <typename T>
inline void sparse_linear_grad_x(const SparseLinearBackward& p) {
  const T* weight = static_cast<const T*>(p.weight);
  at::parallel_for(0, p.tokens, 16, [&](int64_t begin, int64_t end) {
    std::vector<const T*> rows(p.rows);
    std::vector<acc_t<T>> coefficients(p.rows);
    for (int64_t token = begin; token < end; ++token) {
      const T* grad = static_cast<const T*>(p.grad_output) + token * p.rows;
      int64_t count = 0;
      for (int64_t row = 0; row < p.rows; ++row) {
        if (grad[row] != T(0)) {
          rows[count] = weight + row * p.width;
          coefficients[count++] = static_cast<acc_t<T>>(grad[row]);
        }
      }
      combine(rows.data(), coefficients.data(), count, static_cast<T*>(p.grad_x) + token * p.width,
              p.width, Write::kStore);
    }
  });
}

template <typename T>
inline void sparse_linear_grad_weight(const SparseLinearBackward& p) {
  const T* grads = static_cast<const T*>(p.grad_output);
  constexpr int64_t block = 64;  // columns, a few cache lines
  at::parallel_for(0, (p.width + block - 1) / block, 1, [&](int64_t begin, int64_t end) {
    const int64_t column = begin * block;
    const T* x = static_cast<const T*>(p.x) + column;
    acc_t<T>* sums = static_cast<acc_t<T>*>(p.grad_weight) + column;
    const T* xs[RowRun::kMostPairs];
    acc_t<T> coefficients[RowRun::kMostPairs];
    for (const RowRun* run = p.runs; run < p.runs + p.run_count; ++run) {
      for (int64_t i = 0; i < run->count; ++i) {
        const int64_t token = p.pair_tokens[run->begin + i];
        xs[i] = x + token * p.width;
        coefficients[i] = static_cast<acc_t<T>>(grads[token * p.rows + run->row]);
      }
      combine(xs, coefficients, run->count, sums + run->row * p.width,
              std::min(end * block, p.width) - column, Write::kAdd);
    }
  });
}

inline void sparse_linear_backward(const SparseLinearBackward& p) {
  dispatch(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (p.grad_x) {
      sparse_linear_grad_x<T>(p);
    }
    if (p.grad_weight) {
      sparse_linear_grad_weight<T>(p);
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace fff::cpu
