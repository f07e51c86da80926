// The weights of all leaves of a soft tree: from the root down every node splits its weight by
// sigmoid(logit).
#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "vec.h"

namespace fff::cpu {
inline namespace CPU_CAPABILITY {

// The share that each node of one token sends right, sigmoid(z), and left, sigmoid(-z). Both keep
// full relative precision.
template <typename T>
inline void split_shares(const T* logits, int64_t nodes, acc_t<T>* right, acc_t<T>* left) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t i = 0; i < nodes; i += lanes) {
    const int64_t count = std::min(lanes, nodes - i);
    const V z = count == lanes ? load_vec(logits + i) : load_vec(logits + i, count);
    const V e = z.abs().neg().exp();
    const V large = V(A(1)) / (V(A(1)) + e);
    const V small = e * large;
    const V positive = z >= V(A(0));
    V::blendv(small, large, positive).store(right + i, static_cast<int>(count));
    V::blendv(large, small, positive).store(left + i, static_cast<int>(count));
  }
}

constexpr int64_t kMixtureGrain = 1 << 14;  // leaves that are worth a thread

inline void leaf_mixture(const LeafMixture& p) {
  dispatch(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const int64_t leaves = int64_t(1) << p.depth;
    at::parallel_for(0, p.tokens, 1 + kMixtureGrain / leaves, [&](int64_t begin, int64_t end) {
      std::vector<A> right(leaves), left(leaves), weights(leaves), children(leaves);
      for (int64_t t = begin; t < end; ++t) {
        split_shares(static_cast<const T*>(p.node_logits) + t * (leaves - 1), leaves - 1,
                     right.data(), left.data());
        weights[0] = A(1);
        for (int64_t width = 1; width < leaves; width *= 2) {
          const A* r = right.data() + width - 1;
          const A* l = left.data() + width - 1;
          for (int64_t i = 0; i < width; ++i) {
            children[2 * i] = weights[i] * l[i];
            children[2 * i + 1] = weights[i] * r[i];
          }
          weights.swap(children);
        }
        std::transform(weights.begin(), weights.end(), static_cast<T*>(p.mixture) + t * leaves,
                       [](A w) { return static_cast<T>(w); });
      }
    });
  });
}

// With S the sum of grad * mixture over the leaves below a child: d/dz = sigmoid(-z) * S_right -
// sigmoid(z) * S_left.
inline void leaf_mixture_backward(const LeafMixture& p) {
  dispatch(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    using A = acc_t<T>;
    const int64_t leaves = int64_t(1) << p.depth;
    at::parallel_for(0, p.tokens, 1 + kMixtureGrain / leaves, [&](int64_t begin, int64_t end) {
      std::vector<A> right(leaves), left(leaves), sums(leaves);
      for (int64_t t = begin; t < end; ++t) {
        const T* grad = static_cast<const T*>(p.grad_mixture) + t * leaves;
        const T* mixture = static_cast<const T*>(p.mixture) + t * leaves;
        T* grad_logits = static_cast<T*>(p.grad_node_logits) + t * (leaves - 1);
        split_shares(static_cast<const T*>(p.node_logits) + t * (leaves - 1), leaves - 1,
                     right.data(), left.data());
        for (int64_t i = 0; i < leaves; ++i) {
          sums[i] = static_cast<A>(grad[i]) * static_cast<A>(mixture[i]);
        }
        for (int64_t width = leaves / 2; width >= 1; width /= 2) {
          const A* r = right.data() + width - 1;
          const A* l = left.data() + width - 1;
          for (int64_t i = 0; i < width; ++i) {
            const A sum_left = sums[2 * i], sum_right = sums[2 * i + 1];
            grad_logits[width - 1 + i] = static_cast<T>(l[i] * sum_right - r[i] * sum_left);
            sums[i] = sum_left + sum_right;
          }
        }
      }
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace fff::cpu
