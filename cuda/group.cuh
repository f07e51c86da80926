// Warps that work on one item each, and what every such kernel does.
//
// A body is called with an item's index by all lanes of a warp at once.
#pragma once

#include <algorithm>

#include "device.cuh"

namespace fff::cuda {

struct Warp {
  static constexpr int size = kWarpSize;
  int lane;

  template <typename A>
  FFF_DEVICE A sum(A value) const {
    return sum_over_warp(value);
  }
  FFF_DEVICE void sync() const { sync_warp(); }
};

// Calls body(item, warp) for items 0 ... items - 1.
template <typename Body>
struct ForEachItem {
  static constexpr int kThreads = 128;
  static constexpr int kBlocksPerProcessor = 1;
  static constexpr int kWarps = kThreads / kWarpSize;
  Body body;
  int64_t items;

  FFF_DEVICE void operator()(int64_t block) const {
    const Warp warp{lane_index()};
    for (int64_t item = block * kWarps + warp_index(); item < items;
         item += block_count() * kWarps) {
      body(item, warp);
    }
  }
};

template <typename Body, typename Queue>
void for_each_item(const Body& body, int64_t items, Queue& queue) {
  constexpr int64_t kWarps = ForEachItem<Body>::kWarps;
  constexpr int64_t most_blocks = int64_t(1) << 20;
  const int64_t blocks = std::min((items + kWarps - 1) / kWarps, most_blocks);
  queue.launch(ForEachItem<Body>{body, items}, blocks, 0);
}

// Calls body(item, item < items) for items 0, 1, ..., one thread each; threads of whole warps, so
// that bodies may call warp functions.
template <typename Body>
struct ForEachThread {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerProcessor = 1;
  Body body;
  int64_t items;

  FFF_DEVICE void operator()(int64_t block) const {
    const int64_t item = block * kThreads + thread_index();
    body(item, item < items);
  }
};

template <typename Body, typename Queue>
void for_each_thread(const Body& body, int64_t items, Queue& queue) {
  constexpr int64_t kThreads = ForEachThread<Body>::kThreads;
  queue.launch(ForEachThread<Body>{body, items}, (items + kThreads - 1) / kThreads, 0);
}

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
