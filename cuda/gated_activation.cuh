// activation(pre) times the mixture weight of the leaf that a neuron belongs to.
#pragma once

#include "group.cuh"

namespace fff::cuda {

// Item: a token.
template <typename T>
struct GateToken {
  using A = acc_t<T>;
  GatedActivation p;

  template <typename Group>
  FFF_DEVICE void operator()(int64_t token, const Group& group) const {
    const int64_t width = p.leaves * p.leaf_width;
    const T* pre = static_cast<const T*>(p.pre) + token * width;
    const T* mixture = static_cast<const T*>(p.mixture) + token * p.leaves;
    T* output = static_cast<T*>(p.output) + token * width;
    for (int64_t i = group.lane; i < width; i += group.size) {
      output[i] = static_cast<T>(activate(p.activation, static_cast<A>(pre[i])) *
                                 static_cast<A>(mixture[i / p.leaf_width]));
    }
  }
};

// Item: a leaf of a token.
template <typename T>
struct GateBackwardLeaf {
  using A = acc_t<T>;
  GatedActivation p;

  template <typename Group>
  FFF_DEVICE void operator()(int64_t item, const Group& group) const {
    const T* pre = static_cast<const T*>(p.pre) + item * p.leaf_width;
    const T* grad_output = static_cast<const T*>(p.grad_output) + item * p.leaf_width;
    T* grad_pre = static_cast<T*>(p.grad_pre) + item * p.leaf_width;
    const A gate = static_cast<A>(static_cast<const T*>(p.mixture)[item]);
    A sum = A(0);
    for (int64_t j = group.lane; j < p.leaf_width; j += group.size) {
      const A s = static_cast<A>(pre[j]);
      const A grad = static_cast<A>(grad_output[j]);
      grad_pre[j] = static_cast<T>(grad * gate * activation_slope(p.activation, s));
      sum += grad * activate(p.activation, s);
    }
    sum = group.sum(sum);
    if (group.lane == 0) {
      static_cast<T*>(p.grad_mixture)[item] = static_cast<T>(sum);
    }
  }
};

namespace pipeline {

template <typename T, typename Queue>
void gated_activation(const GatedActivation& p, Queue& queue) {
  for_each_item(GateToken<T>{p}, p.tokens, queue);
}

template <typename T, typename Queue>
void gated_activation_backward(const GatedActivation& p, Queue& queue) {
  for_each_item(GateBackwardLeaf<T>{p}, p.tokens * p.leaves, queue);
}

}  // namespace pipeline

}  // namespace fff::cuda
