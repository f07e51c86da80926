// Kernels whose warps, or threads, work on one item each.
#pragma once

#include "device.cuh"

namespace fff::cuda {

// Calls body(item) for items 0 ... items - 1, by all lanes of a warp at once.
template <typename Body>
struct ForEachItem {
  static constexpr int kThreads = 128;
  static constexpr int kBlocksPerProcessor = 1;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int64_t kSharedBytes = 0;
  Body body;
  int64_t items;

  FFF_HOST_DEVICE int64_t blocks() const {
    constexpr int64_t kMost = int64_t(1) << 20;
    const int64_t wanted = (items + kWarps - 1) / kWarps;
    return wanted < kMost ? wanted : kMost;
  }

  FFF_DEVICE void operator()(int64_t block) const {
    for (int64_t item = block * kWarps + warp_index(); item < items; item += blocks() * kWarps) {
      body(item);
    }
  }
};

template <typename Body, typename Queue>
void for_each_item(const Body& body, int64_t items, Queue& queue) {
  const ForEachItem<Body> all = {body, items};
  queue.launch(all, all.blocks(), all.kSharedBytes);
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
