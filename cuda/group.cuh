// The threads that work on one item together, and what every kernel body does with them.
//
// A body is called with an item's index by all threads of a Group at once. A Group has
//   - lane, size: which of its threads this is, and of how many;
//   - sum(value): the sum over its threads, to the last bit the same in all of them, for routes
//     depend on it;
//   - sync(): after it, what its threads wrote to memory before is visible to all of them.
//
// On a GPU that is a warp. Bodies use nothing else of CUDA, so that a host compiler can run them
// with a Group of its own.
#pragma once

#include <cstdint>
#include <type_traits>

#include "params.h"

#if defined(__CUDACC__)
#define FFF_DEVICE __device__
#else
#define FFF_DEVICE
#endif

namespace fff::cuda {

// The type of scores and sums.
template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

#if defined(__CUDACC__)
struct Warp {
  static constexpr int size = 32;
  int lane;

  template <typename A>
  __device__ A sum(A value) const {
    for (int distance = size / 2; distance > 0; distance /= 2) {
      value += __shfl_xor_sync(0xffffffffu, value, distance);
    }
    return value;
  }
  __device__ void sync() const { __syncwarp(); }
};
#endif

// The level of a node in heap order.
FFF_DEVICE inline int level_of(int64_t node) {
  int level = 0;
  while ((int64_t(2) << level) - 1 <= node) {
    ++level;
  }
  return level;
}

// <a, b>
template <typename T, typename Group>
FFF_DEVICE acc_t<T> dot(const T* a, const T* b, int64_t width, const Group& group) {
  using A = acc_t<T>;
  A sum = A(0);
  for (int64_t i = group.lane; i < width; i += group.size) {
    sum += static_cast<A>(a[i]) * static_cast<A>(b[i]);
  }
  return group.sum(sum);
}

// Stores to an array of T, or of the accumulation type if `dtype` is not T's own.
template <typename T>
FFF_DEVICE void store(void* array, DType dtype, DType own, int64_t i, acc_t<T> value) {
  if (dtype == own) {
    static_cast<T*>(array)[i] = static_cast<T>(value);
  } else {
    static_cast<acc_t<T>*>(array)[i] = value;
  }
}

}  // namespace fff::cuda
