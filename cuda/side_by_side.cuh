// Several kernels of one kind in one launch, so that the first blocks of one run beside the last
// of another.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "device.cuh"

namespace fff::cuda {

template <typename Body>
struct SideBySide {
  static constexpr int kMost = 4;
  static constexpr int kThreads = Body::kThreads;
  static constexpr int kBlocksPerProcessor = Body::kBlocksPerProcessor;
  Body bodies[kMost];
  int64_t ends[kMost];  // the block after each one's last

  FFF_DEVICE void operator()(int64_t block) const {
    int own = 0;
    while (block >= ends[own]) {
      ++own;
    }
    bodies[own](own > 0 ? block - ends[own - 1] : block);
  }
};

namespace pipeline {

template <typename Body, typename Queue, size_t... I>
void launch_some(const Body* bodies, size_t count, Queue& queue, std::index_sequence<I...>) {
  // What there is no body for has no blocks.
  SideBySide<Body> some = {{bodies[std::min(I, count - 1)]...}, {}};
  int64_t blocks = 0;
  for (size_t i = 0; i < some.kMost; ++i) {
    blocks += i < count ? bodies[i].blocks() : 0;
    some.ends[i] = blocks;
  }
  static_assert(sizeof(some) <= 4096, "more than a kernel's parameters may be");
  queue.launch(some, blocks, Body::kSharedBytes);
}

// Each body says how many blocks() it has.
template <typename Body, typename Queue>
void launch_side_by_side(const std::vector<Body>& bodies, Queue& queue) {
  constexpr size_t kMost = SideBySide<Body>::kMost;
  for (size_t first = 0; first < bodies.size(); first += kMost) {
    launch_some(bodies.data() + first, std::min(bodies.size() - first, kMost), queue,
                std::make_index_sequence<kMost>());
  }
}

}  // namespace pipeline

}  // namespace fff::cuda
