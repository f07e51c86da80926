// The weights of all leaves of a soft tree.
#pragma once

#include <cmath>

#include "group.cuh"

namespace fff::cuda {

// sigmoid(z) if `right`, else sigmoid(-z), both with full relative precision.
template <typename A>
FFF_DEVICE A split_share(A z, bool right) {
  const A e = std::exp(-std::abs(z));
  const A large = A(1) / (A(1) + e);
  return (z >= A(0)) == right ? large : e * large;
}

// Item: a token.
template <typename T>
struct MixtureToken {
  using A = acc_t<T>;
  LeafMixture p;

  template <typename Group>
  FFF_DEVICE void operator()(int64_t token, const Group& group) const {
    const int64_t leaves = int64_t(1) << p.depth;
    const T* logits = static_cast<const T*>(p.node_logits) + token * (leaves - 1);
    for (int64_t leaf = group.lane; leaf < leaves; leaf += group.size) {
      A weight = A(1);
      for (int level = 0; level < p.depth; ++level) {
        const int64_t node = (int64_t(1) << level) - 1 + (leaf >> (p.depth - level));
        const bool right = (leaf >> (p.depth - 1 - level)) & 1;
        weight *= split_share(static_cast<A>(logits[node]), right);
      }
      static_cast<T*>(p.mixture)[token * leaves + leaf] = static_cast<T>(weight);
    }
  }
};

// d/dz = sigmoid(-z) * S_right - sigmoid(z) * S_left, where S is the sum of grad * mixture over the
// leaves below a child.
//
// Item: a node of a token.
template <typename T>
struct MixtureBackwardNode {
  using A = acc_t<T>;
  LeafMixture p;

  template <typename Group>
  FFF_DEVICE void operator()(int64_t item, const Group& group) const {
    const int64_t nodes = (int64_t(1) << p.depth) - 1;
    const int64_t token = item / nodes;
    const int64_t node = item % nodes;
    const int level = level_of(node);
    const int64_t below_child = int64_t(1) << (p.depth - 1 - level);  // leaves
    const int64_t position = node - ((int64_t(1) << level) - 1);
    const int64_t first = token * (nodes + 1) + 2 * position * below_child;
    const A sum_left = weighted_grad(first, below_child, group);
    const A sum_right = weighted_grad(first + below_child, below_child, group);
    if (group.lane == 0) {
      const A z = static_cast<A>(static_cast<const T*>(p.node_logits)[item]);
      static_cast<T*>(p.grad_node_logits)[item] =
          static_cast<T>(split_share(z, false) * sum_right - split_share(z, true) * sum_left);
    }
  }

 private:
  template <typename Group>
  FFF_DEVICE A weighted_grad(int64_t first, int64_t count, const Group& group) const {
    return dot(static_cast<const T*>(p.grad_mixture) + first,
               static_cast<const T*>(p.mixture) + first, count, group);
  }
};

namespace pipeline {

template <typename T, typename Queue>
void leaf_mixture(const LeafMixture& p, Queue& queue) {
  for_each_item(MixtureToken<T>{p}, p.tokens, queue);
}

template <typename T, typename Queue>
void leaf_mixture_backward(const LeafMixture& p, Queue& queue) {
  const int64_t nodes = (int64_t(1) << p.depth) - 1;
  for_each_item(MixtureBackwardNode<T>{p}, p.tokens * nodes, queue);
}

}  // namespace pipeline

}  // namespace fff::cuda
