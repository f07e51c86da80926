// What walks down a tree for a token: its path, or the alternates to the path's decisions.
//
// Walkers are grouped like pairs of a token and a tree, where a "token" is any of the token's
// walkers.
#pragma once

#include <algorithm>

#include "grouping.cuh"
#include "tree_slabs.cuh"

namespace fff::cuda {

struct Walkers {
  int64_t trees;
  int count;   // of a token in a tree
  int stride;  // of arrays [tokens, trees, stride], whose first `count` entries count
  // [tokens, trees, stride] where each is among the nodes of its level; below 0, nowhere
  int64_t* positions;
  bool complete;  // none is nowhere

  FFF_DEVICE int64_t token(int64_t walker) const {
    return static_cast<uint32_t>(walker) / static_cast<uint32_t>(count);
  }
  FFF_DEVICE int own(int64_t walker) const {
    return static_cast<int>(static_cast<uint32_t>(walker) % static_cast<uint32_t>(count));
  }
  FFF_DEVICE int64_t pair(int64_t walker, int64_t tree) const {
    return token(walker) * trees + tree;
  }
  // In arrays.
  FFF_DEVICE int64_t index(int64_t walker, int64_t tree) const {
    return pair(walker, tree) * stride + own(walker);
  }
};

// Says where walkers go on from a grouping whose level is `children.levels` higher.
struct RouteWalkers {
  static constexpr int kThreads = kTileTokens;
  static constexpr int kBlocksPerProcessor = 1;
  static constexpr int64_t kSharedBytes = Children::kSharedBytes;
  Grouping from;
  Children children;
  Walkers walkers;
  int level;  // of their positions

  FFF_DEVICE void operator()(int64_t block) const {
    const Tile tile = from.tile(block);
    int child = -1;
    if (thread_index() < tile.count) {
      const int64_t walker = from.token(tile, thread_index());
      const int64_t position = walkers.positions[walkers.index(walker, from.tree(tile.group))];
      const int64_t below = position >> (level - from.level - children.levels);
      child = position < 0 ? -1 : static_cast<int>(below & (children.children() - 1));
    }
    children.record(tile, child, shared_memory());
  }
};

namespace pipeline {

// Groups walkers, whose positions are those of `positions_level`, by their nodes at `level`, which
// takes several steps of at most `most_levels`.
template <typename Queue>
Grouping group_walkers(Grouping grouping, const Walkers& walkers, int positions_level, int level,
                       int most_levels, Queue& queue) {
  while (grouping.level < level) {
    const int levels = std::min(level - grouping.level, most_levels);
    Grouping next = grouping;
    next.level += levels;
    int32_t* const starts = queue.template array<int32_t>(next.groups() + 1);
    int32_t* const order = queue.template array<int32_t>(grouping.pairs());
    queue.scope([&] {
      const int64_t counts = grouping.tiles() << levels;
      const Children children = {levels, queue.template array<int32_t>(counts + 1),
                                 queue.template array<uint16_t>(grouping.pairs())};
      const RouteWalkers route = {grouping, children, walkers, positions_level};
      queue.launch(route, grouping.tiles(), route.kSharedBytes);
      regroup(grouping, children, walkers.complete, starts, order, queue);
    });
    next.starts = starts;
    next.order = order;
    grouping = next;
  }
  return grouping;
}

}  // namespace pipeline

}  // namespace fff::cuda
