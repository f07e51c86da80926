// activation(pre) times the mixture weight of the leaf that a neuron belongs to.
#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "vec_activation.h"

namespace fff::cpu {
inline namespace CPU_CAPABILITY {

constexpr int64_t kGateGrain = 1 << 14;  // neurons that are worth a thread

// Repeats each weight leaf_width times, so that the loops over neurons need not know where leaves
// begin.
template <typename T>
inline void spread(const T* mixture, const GatedActivation& p, acc_t<T>* gates) {
  for (int64_t leaf = 0; leaf < p.leaves; ++leaf) {
    std::fill_n(gates + leaf * p.leaf_width, p.leaf_width, static_cast<acc_t<T>>(mixture[leaf]));
  }
}

inline void gated_activation(const GatedActivation& p) {
  dispatch(p.dtype, [&](auto zero) {
    dispatch_activation(p.activation, [&](auto kind) {
      using T = decltype(zero);
      using A = acc_t<T>;
      using Act = VecActivation<decltype(kind)::value, A>;
      constexpr int64_t lanes = kLanes<T>;
      const int64_t width = p.leaves * p.leaf_width;
      at::parallel_for(0, p.tokens, 1 + kGateGrain / width, [&](int64_t begin, int64_t end) {
        std::vector<A> gates(width + lanes);
        for (int64_t t = begin; t < end; ++t) {
          const T* pre = static_cast<const T*>(p.pre) + t * width;
          T* output = static_cast<T*>(p.output) + t * width;
          spread(static_cast<const T*>(p.mixture) + t * p.leaves, p, gates.data());
          int64_t i = 0;
          for (; i + lanes <= width; i += lanes) {
            store_vec(output + i, Act::value(load_vec(pre + i)) * Vec<A>::loadu(gates.data() + i));
          }
          if (i < width) {
            store_vec(output + i,
                      Act::value(load_vec(pre + i, width - i)) * Vec<A>::loadu(gates.data() + i),
                      width - i);
          }
        }
      });
    });
  });
}

inline void gated_activation_backward(const GatedActivation& p) {
  dispatch(p.dtype, [&](auto zero) {
    dispatch_activation(p.activation, [&](auto kind) {
      using T = decltype(zero);
      using A = acc_t<T>;
      using Act = VecActivation<decltype(kind)::value, A>;
      constexpr int64_t lanes = kLanes<T>;
      const int64_t width = p.leaves * p.leaf_width;
      at::parallel_for(0, p.tokens, 1 + kGateGrain / width, [&](int64_t begin, int64_t end) {
        std::vector<A> gates(width + lanes), products(width + lanes);
        for (int64_t t = begin; t < end; ++t) {
          const T* pre = static_cast<const T*>(p.pre) + t * width;
          const T* grad = static_cast<const T*>(p.grad_output) + t * width;
          T* grad_pre = static_cast<T*>(p.grad_pre) + t * width;
          T* grad_mixture = static_cast<T*>(p.grad_mixture) + t * p.leaves;
          spread(static_cast<const T*>(p.mixture) + t * p.leaves, p, gates.data());
          for (int64_t i = 0; i < width; i += lanes) {
            const int64_t count = std::min(lanes, width - i);
            const bool whole = count == lanes;
            const Vec<A> s = whole ? load_vec(pre + i) : load_vec(pre + i, count);
            const Vec<A> g = whole ? load_vec(grad + i) : load_vec(grad + i, count);
            const Vec<A> down = g * Vec<A>::loadu(gates.data() + i) * Act::slope(s);
            whole ? store_vec(grad_pre + i, down) : store_vec(grad_pre + i, down, count);
            (g * Act::value(s)).store(products.data() + i);
          }
          for (int64_t leaf = 0; leaf < p.leaves; ++leaf) {
            const A* product = products.data() + leaf * p.leaf_width;
            A sum = A(0);
            for (int64_t j = 0; j < p.leaf_width; ++j) {
              sum += product[j];
            }
            grad_mixture[leaf] = static_cast<T>(sum);
          }
        }
      });
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace fff::cpu
