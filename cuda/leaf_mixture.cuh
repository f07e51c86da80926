// The weights of all leaves of a soft tree. Both passes read and write each element once: a thread
// has a subtree of 8 leaves in registers.
#pragma once

#include <algorithm>
#include <cmath>

#include "group.cuh"
#include "rows.cuh"

namespace fff::cuda {

inline constexpr int kOwnLevels = 3;  // of a thread's subtree
inline constexpr int kOwnLeaves = 1 << kOwnLevels;

// sigmoid(z) if `right`, else sigmoid(-z), both with full relative precision.
template <typename A>
FFF_DEVICE A split_share(A z, bool right) {
  const A e = std::exp(-std::abs(z));
  const A large = A(1) / (A(1) + e);
  return (z >= A(0)) == right ? large : e * large;
}

// `count` values, at most 8, of an array of T.
template <typename T>
FFF_DEVICE void load_leaves(acc_t<T> (&values)[kOwnLeaves], const T* from, int count,
                            bool aligned) {
  FFF_UNROLL
  for (int first = 0; first < kOwnLeaves; first += kPerChunk<T>) {
    const auto e = Elements<T>::load(from + first, count - first, aligned);
    FFF_UNROLL
    for (int i = 0; i < kPerChunk<T>; ++i) {
      values[first + i] = static_cast<acc_t<T>>(e.values[i]);
    }
  }
}

// Item: a subtree of a token.
template <typename T>
struct MixtureSubtree {
  using A = acc_t<T>;
  LeafMixture p;

  // Of a subtree.
  FFF_HOST_DEVICE int levels() const { return p.depth < kOwnLevels ? p.depth : kOwnLevels; }
  int64_t items() const { return p.tokens << (p.depth - levels()); }

  FFF_DEVICE void operator()(int64_t item, bool exists) const {
    if (!exists) {
      return;
    }
    const int above = p.depth - levels();
    const int64_t token = item >> above;
    const int64_t subtree = item & ((int64_t(1) << above) - 1);
    const T* logits = static_cast<const T*>(p.node_logits) + token * ((int64_t(1) << p.depth) - 1);
    A weights[kOwnLeaves] = {A(1)};
    for (int level = 0; level < above; ++level) {
      const int64_t node = (int64_t(1) << level) - 1 + (subtree >> (above - level));
      weights[0] *= split_share(static_cast<A>(logits[node]), (subtree >> (above - 1 - level)) & 1);
    }
    FFF_UNROLL
    for (int level = 0; level < kOwnLevels; ++level) {
      if (level < levels()) {
        const T* of_level = logits + (int64_t(1) << (above + level)) - 1 + (subtree << level);
        FFF_UNROLL
        for (int i = (1 << level) - 1; i >= 0; --i) {
          const A z = static_cast<A>(of_level[i]);
          weights[2 * i + 1] = weights[i] * split_share(z, true);
          weights[2 * i] = weights[i] * split_share(z, false);
        }
      }
    }
    T* const to = static_cast<T*>(p.mixture) + (item << levels());
    const bool aligned = is_aligned(p.mixture, 0);
    FFF_UNROLL
    for (int first = 0; first < kOwnLeaves; first += kPerChunk<T>) {
      Elements<T> e;
      FFF_UNROLL
      for (int i = 0; i < kPerChunk<T>; ++i) {
        e.values[i] = static_cast<T>(weights[first + i]);
      }
      e.store(to + first, (1 << levels()) - first, aligned);
    }
  }
};

// d/dz = sigmoid(-z) * S_right - sigmoid(z) * S_left, where S is the sum of grad * mixture over the
// leaves below a child. A warp goes up 8 levels at most: 3 in its threads, 5 between them.
//
// Item: a subtree of a token, whose leaves are those of the tree or, further up, the roots of the
// subtrees of a launch before.
template <typename T>
struct MixtureBackwardSubtree {
  using A = acc_t<T>;
  static constexpr int kMostLevels = kOwnLevels + 5;
  LeafMixture p;
  int depth;      // of the leaves
  const A* sums;  // [tokens, 2^depth] S of the leaves; null: of the tree's
  A* to_sums;     // [tokens, 2^(depth - levels)] S of the roots; null: not wanted

  FFF_HOST_DEVICE int levels() const { return depth < kMostLevels ? depth : kMostLevels; }
  FFF_HOST_DEVICE int own_levels() const { return depth < kOwnLevels ? depth : kOwnLevels; }
  int64_t items() const { return p.tokens << (depth - own_levels()); }

  FFF_DEVICE void operator()(int64_t item, bool exists) const {
    const int above = depth - own_levels();
    const int64_t token = item >> above;
    const int64_t subtree = item & ((int64_t(1) << above) - 1);
    A own[kOwnLeaves] = {};
    if (exists) {
      load(own, item << own_levels());
    }
    FFF_UNROLL
    for (int level = kOwnLevels - 1; level >= 0; --level) {
      if (level < own_levels()) {
        FFF_UNROLL
        for (int i = 0; i < 1 << level; ++i) {
          if (exists) {
            write(token, above + level, (subtree << level) + i, own[2 * i], own[2 * i + 1]);
          }
          own[i] = own[2 * i] + own[2 * i + 1];
        }
      }
    }
    A sum = own[0];
    for (int up = 1; up <= levels() - own_levels(); ++up) {
      const int64_t bit = int64_t(1) << (up - 1);
      const A other = shuffle_xor(sum, static_cast<int>(bit));
      const A left = subtree & bit ? other : sum;
      const A right = subtree & bit ? sum : other;
      if (exists && (subtree & (2 * bit - 1)) == 0) {
        write(token, above - up, subtree >> up, left, right);
      }
      sum = left + right;
    }
    const int between = levels() - own_levels();
    if (exists && to_sums && (subtree & ((int64_t(1) << between) - 1)) == 0) {
      to_sums[item >> between] = sum;
    }
  }

 private:
  FFF_DEVICE void load(A (&own)[kOwnLeaves], int64_t first) const {
    const int count = 1 << own_levels();
    if (sums) {
      load_leaves<A>(own, sums + first, count, is_aligned(sums, 0));
      return;
    }
    A mixture[kOwnLeaves];
    load_leaves<T>(mixture, static_cast<const T*>(p.mixture) + first, count,
                   is_aligned(p.mixture, 0));
    load_leaves<T>(own, static_cast<const T*>(p.grad_mixture) + first, count,
                   is_aligned(p.grad_mixture, 0));
    FFF_UNROLL
    for (int i = 0; i < kOwnLeaves; ++i) {
      own[i] *= mixture[i];
    }
  }

  FFF_DEVICE void write(int64_t token, int level, int64_t position, A left, A right) const {
    const int64_t i = token * ((int64_t(1) << p.depth) - 1) + (int64_t(1) << level) - 1 + position;
    const A z = static_cast<A>(static_cast<const T*>(p.node_logits)[i]);
    static_cast<T*>(p.grad_node_logits)[i] =
        static_cast<T>(split_share(z, false) * right - split_share(z, true) * left);
  }
};

namespace pipeline {

template <typename T, typename Queue>
void leaf_mixture(const LeafMixture& p, Queue& queue) {
  const MixtureSubtree<T> body = {p};
  for_each_thread(body, body.items(), queue);
}

template <typename T, typename Queue>
void leaf_mixture_backward(const LeafMixture& p, Queue& queue) {
  MixtureBackwardSubtree<T> body = {p, p.depth, nullptr, nullptr};
  while (body.depth > 0) {
    const int next = body.depth - body.levels();
    body.to_sums = next > 0 ? queue.template array<acc_t<T>>(p.tokens << next) : nullptr;
    for_each_thread(body, body.items(), queue);
    body.depth = next;
    body.sums = body.to_sums;
  }
}

}  // namespace pipeline

}  // namespace fff::cuda
