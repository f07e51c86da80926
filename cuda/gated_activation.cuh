// activation(pre) times the mixture weight of the leaf that a neuron belongs to. Both passes read
// and write each element once, in chunks.
#pragma once

#include "group.cuh"
#include "rows.cuh"

namespace fff::cuda {

// Item: a chunk of all tokens' neurons.
template <typename T>
struct GateChunk {
  using A = acc_t<T>;
  GatedActivation p;

  FFF_HOST_DEVICE int64_t elements() const { return p.tokens * p.leaves * p.leaf_width; }
  int64_t items() const { return (elements() + kPerChunk<T> - 1) / kPerChunk<T>; }

  FFF_DEVICE void operator()(int64_t item, bool exists) const {
    if (!exists) {
      return;
    }
    const int64_t first = item * kPerChunk<T>;
    const int64_t count = elements() - first;
    auto e = Elements<T>::load(static_cast<const T*>(p.pre) + first, count, is_aligned(p.pre, 0));
    const T* gate = static_cast<const T*>(p.mixture) + first / p.leaf_width;
    int64_t left = p.leaf_width - first % p.leaf_width;  // neurons of its leaf
    FFF_UNROLL
    for (int i = 0; i < kPerChunk<T>; ++i) {
      if (i < count) {
        e.values[i] = static_cast<T>(activate(p.activation, static_cast<A>(e.values[i])) *
                                     static_cast<A>(*gate));
        if (--left == 0) {
          ++gate;
          left = p.leaf_width;
        }
      }
    }
    e.store(static_cast<T*>(p.output) + first, count, is_aligned(p.output, 0));
  }
};

// Item: one of the `lanes` threads that share a leaf of a token.
template <typename T>
struct GateBackwardLane {
  using A = acc_t<T>;
  GatedActivation p;
  int lanes;  // a power of 2, at most a warp

  explicit GateBackwardLane(const GatedActivation& params) : p(params), lanes(1) {
    while (lanes < kWarpSize && lanes * kPerChunk<T> < p.leaf_width) {
      lanes *= 2;
    }
  }
  int64_t items() const { return p.tokens * p.leaves * lanes; }

  FFF_DEVICE void operator()(int64_t item, bool exists) const {
    const int lane = static_cast<int>(item % lanes);
    const int64_t leaf = item / lanes;
    A sum = exists ? sum_of_lane(leaf, lane) : A(0);
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      sum += shuffle_xor(sum, distance);
    }
    if (exists && lane == 0) {
      static_cast<T*>(p.grad_mixture)[leaf] = static_cast<T>(sum);
    }
  }

 private:
  FFF_DEVICE bool aligned(const void* array) const {
    return is_aligned(array, p.leaf_width * static_cast<int64_t>(sizeof(T)));
  }

  FFF_DEVICE A sum_of_lane(int64_t leaf, int lane) const {
    const T* pre = static_cast<const T*>(p.pre) + leaf * p.leaf_width;
    const T* grad_output = static_cast<const T*>(p.grad_output) + leaf * p.leaf_width;
    T* grad_pre = static_cast<T*>(p.grad_pre) + leaf * p.leaf_width;
    const A gate = static_cast<A>(static_cast<const T*>(p.mixture)[leaf]);
    A sum = A(0);
    for (int64_t j = lane * kPerChunk<T>; j < p.leaf_width; j += lanes * kPerChunk<T>) {
      const int64_t count = p.leaf_width - j;
      const auto s = Elements<T>::load(pre + j, count, aligned(p.pre));
      auto g = Elements<T>::load(grad_output + j, count, aligned(p.grad_output));
      FFF_UNROLL
      for (int i = 0; i < kPerChunk<T>; ++i) {
        if (i < count) {
          const A own = static_cast<A>(s.values[i]);
          const A grad = static_cast<A>(g.values[i]);
          g.values[i] = static_cast<T>(grad * gate * activation_slope(p.activation, own));
          sum += grad * activate(p.activation, own);
        }
      }
      g.store(grad_pre + j, count, aligned(p.grad_pre));
    }
    return sum;
  }
};

namespace pipeline {

template <typename T, typename Queue>
void gated_activation(const GatedActivation& p, Queue& queue) {
  const GateChunk<T> body = {p};
  for_each_thread(body, body.items(), queue);
}

template <typename T, typename Queue>
void gated_activation_backward(const GatedActivation& p, Queue& queue) {
  const GateBackwardLane<T> body(p);
  for_each_thread(body, body.items(), queue);
}

}  // namespace pipeline

}  // namespace fff::cuda
