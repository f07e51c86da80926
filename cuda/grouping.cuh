// Tokens grouped by the subtree that they have reached, so that a block's 128 tokens share all rows
// of weights that any of them may need.
//
// A pair of a token and a tree is in the group of the node at `level` that its path visits. Pairs
// lie in the order of their groups, those of a group in the order of tokens. A block works on a
// tile, up to 128 pairs of one group. Since no host knows the sizes of groups, there are as many
// blocks as the worst sizes need: group g has one for every multiple of 128 pairs in it, and one
// more, so that tiles can be found without a list of them.
#pragma once

#include "group.cuh"

namespace fff::cuda {

inline constexpr int kTileTokens = 128;

struct Tile {
  int64_t group;
  int64_t first;  // of its pairs
  int count;      // 0 ... 128 of them
  // This tile's number in its group, the first and the number of the group's tiles.
  int64_t in_group, group_begin, group_tiles;
};

struct Grouping {
  int64_t tokens;
  int64_t trees;
  int level;
  // Null at level 0: all tokens, in order, for each tree.
  const int32_t* starts;  // [groups + 1] first pair, and after the last
  const int32_t* order;   // [pairs] the token of each

  FFF_HOST_DEVICE int64_t groups() const { return trees << level; }
  FFF_HOST_DEVICE int64_t pairs() const { return trees * tokens; }
  // All tiles, of up to kTokens pairs, and those of the trees before `tree`: they are known
  // everywhere.
  template <int kTokens = kTileTokens>
  FFF_HOST_DEVICE int64_t tiles() const {
    return pairs() / kTokens + groups();
  }
  FFF_HOST_DEVICE int64_t tiles_before(int64_t tree) const {
    return tree * tokens / kTileTokens + (tree << level);
  }

  FFF_DEVICE int64_t tree(int64_t group) const { return group >> level; }
  // Of the node among those of its level.
  FFF_DEVICE int64_t position(int64_t group) const { return group - (tree(group) << level); }
  // Of a tile's pair.
  FFF_DEVICE int64_t token(const Tile& tile, int row) const {
    const int64_t pair = tile.first + row;
    return order ? order[pair] : pair - tile.group * tokens;
  }

  // First of a group's pairs; for `groups()`, how many pairs there are.
  FFF_DEVICE int64_t start(int64_t group) const { return starts ? starts[group] : group * tokens; }

  // Called by whole warps.
  template <int kTokens = kTileTokens>
  FFF_DEVICE Tile tile(int64_t index) const {
    const auto first_tile = [&](int64_t group) { return start(group) / kTokens + group; };
    const int64_t group = last_group([&](int64_t g) { return first_tile(g) <= index; });
    const int64_t begin = first_tile(group);
    const int64_t in_group = index - begin;
    const int64_t first = start(group) + in_group * kTokens;
    const int64_t left = start(group + 1) - first;
    const int count = static_cast<int>(left < 0 ? 0 : left > kTokens ? kTokens : left);
    return {group, first, count, in_group, begin, first_tile(group + 1) - begin};
  }

  // The last group that has a property which is no later group's once it is not one's; the first
  // has it, or is the answer. By 32 probes at once, so called by whole warps.
  template <typename Has>
  FFF_DEVICE int64_t last_group(const Has& has) const {
    int64_t first = 0, count = groups();
    while (count > 1) {
      const int64_t step = (count + kWarpSize - 1) / kWarpSize;
      const int64_t probe = first + lane_index() * step;
      const bool begins = probe < first + count && (probe == first || has(probe));
      const int64_t skipped = (count_bits(ballot(begins)) - 1) * step;
      first += skipped;
      count = count - skipped < step ? count - skipped : step;
    }
    return first;
  }
};

// What a slab's kernel leaves for the next grouping: where each pair of a tile goes on.
struct Children {
  int levels;        // the new grouping's, below the old one's
  int32_t* counts;   // [tiles of a group, for each group][child][tile] pairs that go there
  uint16_t* places;  // [pairs] child * 128 + number among those of the tile that go there

  static constexpr int kMostLevels = 6;
  static constexpr int kWarps = kTileTokens / kWarpSize;
  static constexpr int64_t kSharedBytes = sizeof(int) * kWarps << kMostLevels;
  static constexpr uint16_t kNowhere = 0xffff;

  FFF_HOST_DEVICE int64_t children() const { return int64_t(1) << levels; }
  FFF_DEVICE int64_t index(const Tile& tile, int64_t child) const {
    return tile.group_begin * children() + child * tile.group_tiles + tile.in_group;
  }

  // Called by all threads of a block, of which there are at least 128; thread i < tile.count says
  // where pair i goes, all others -1, as it does to leave its pair out. `shared` has kSharedBytes.
  FFF_DEVICE void record(const Tile& tile, int child, unsigned char* shared) const {
    if (tile.in_group >= tile.group_tiles) {
      return;  // pairs were left out before, so that there are blocks behind the last tile
    }
    int* const of_warps = reinterpret_cast<int*>(shared);  // [warps][children] pairs
    const int i = thread_index(), warp = warp_index();
    for (int j = i; i < kTileTokens && j < kWarps << levels; j += kTileTokens) {
      of_warps[j] = 0;
    }
    sync_threads();
    int before = 0;
    if (i < kTileTokens) {
      uint32_t same = ballot(child >= 0);  // lanes with this one's child
      for (int bit = 0; bit < levels; ++bit) {
        const bool set = child >> bit & 1;
        const uint32_t votes = ballot(set);
        same &= set ? votes : ~votes;
      }
      before = count_bits(same & ((uint32_t(1) << lane_index()) - 1));
      if (child >= 0 && before == 0) {
        of_warps[(warp << levels) + child] = count_bits(same);
      }
    }
    sync_threads();
    if (i < tile.count) {
      for (int earlier = 0; child >= 0 && earlier < warp; ++earlier) {
        before += of_warps[(earlier << levels) + child];
      }
      places[tile.first + i] =
          child < 0 ? kNowhere : static_cast<uint16_t>(child * kTileTokens + before);
    }
    if (i < children()) {
      int all = 0;
      for (int of = 0; of < kWarps; ++of) {
        all += of_warps[(of << levels) + i];
      }
      counts[index(tile, i)] = all;
    }
  }
};

// The next grouping from `counts`: their running sums are the pairs' places in it.
struct Regroup {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerProcessor = 1;
  static constexpr int64_t kSharedBytes = 2 * sizeof(int32_t) << Children::kMostLevels;
  Grouping from;
  Children children;
  bool summed;  // the counts already; only if no pair was left out may they be summed here
  int32_t* starts;
  int32_t* order;

  FFF_DEVICE void operator()(int64_t block) const {
    const Tile tile = from.tile(block);
    if (tile.count == 0 && tile.in_group > 0) {
      return;
    }
    // Where this tile's pairs begin in the new order, by child.
    int32_t* const begins = reinterpret_cast<int32_t*>(shared_memory());
    const int i = thread_index();
    if (!summed) {
      sum(tile, begins, begins + children.children());
    } else if (i < children.children()) {
      begins[i] = children.counts[children.index(tile, i)];
    }
    sync_threads();
    if (i < tile.count) {
      const int place = children.places[tile.first + i];
      if (place != Children::kNowhere) {
        order[begins[place / kTileTokens] + place % kTileTokens] =
            static_cast<int32_t>(from.token(tile, i));
      }
    }
    if (tile.in_group == 0 && i < children.children()) {
      starts[tile.group * children.children() + i] = begins[i];
    }
    if (tile.in_group == 0 && tile.group == from.groups() - 1 && i == 0) {
      const int64_t end = (tile.group_begin + tile.group_tiles) * children.children();
      starts[from.groups() * children.children()] =
          summed ? children.counts[end] : static_cast<int32_t>(from.pairs());
    }
  }

 private:
  // The running sums that a tile needs, from all counts of its group, a warp for each child;
  // `totals` has room for one number of each. Behind it, a barrier.
  FFF_DEVICE void sum(const Tile& tile, int32_t* begins, int32_t* totals) const {
    const int count = static_cast<int>(children.children());
    for (int child = warp_index(); child < count; child += kThreads / kWarpSize) {
      const int32_t* const counts =
          children.counts + tile.group_begin * count + child * tile.group_tiles;
      int32_t total = 0, before = 0;
      FFF_UNROLL_BY(4)
      for (int64_t j = lane_index(); j < tile.group_tiles; j += kWarpSize) {
        const int32_t pairs = counts[j];
        total += pairs;
        before += j < tile.in_group ? pairs : 0;
      }
      total = sum_over_warp(total);
      before = sum_over_warp(before);
      if (lane_index() == 0) {
        totals[child] = total;
        begins[child] = before;
      }
    }
    sync_threads();
    const int own = thread_index();
    if (own < count) {
      int64_t begin = from.start(tile.group) + begins[own];
      for (int child = 0; child < own; ++child) {
        begin += totals[child];
      }
      begins[own] = static_cast<int32_t>(begin);
    }
  }
};

namespace pipeline {

// After a kernel that has recorded `children` for all tiles of `from`, and has left pairs out
// unless they are `complete`.
template <typename Queue>
void regroup(const Grouping& from, const Children& children, bool complete, int32_t* starts,
             int32_t* order, Queue& queue) {
  // Every block sums its group's counts, which costs less than two more kernels while they are few.
  constexpr int64_t kFewTokens = int64_t(1) << 15;
  const bool summed = !complete || from.tokens > kFewTokens;
  if (summed) {
    queue.exclusive_sum(children.counts, from.tiles() * children.children() + 1);
  }
  queue.launch(Regroup{from, children, summed, starts, order}, from.tiles(), Regroup::kSharedBytes);
}

}  // namespace pipeline

// Room for the groupings of one call, used again for each: the one before is read meanwhile.
class Groupings {
 public:
  template <typename Queue>
  Groupings(const Grouping& first, int most_child_levels, int last_level, Queue& queue)
      : current_(first) {
    Grouping last = first;
    last.level = last_level;
    counts_ = queue.template array<int32_t>((last.tiles() << most_child_levels) + 1);
    places_ = queue.template array<uint16_t>(first.pairs());
    for (int i = 0; i < 2; ++i) {
      starts_[i] = queue.template array<int32_t>(last.groups() + 1);
      order_[i] = queue.template array<int32_t>(first.pairs());
    }
  }

  const Grouping& current() const { return current_; }
  Children children(int levels) const { return {levels, counts_, places_}; }

  // After a kernel that has recorded `children` for all tiles of the current grouping.
  template <typename Queue>
  void next(const Children& children, Queue& queue) {
    pipeline::regroup(current_, children, true, starts_[side_], order_[side_], queue);
    current_.level += children.levels;
    current_.starts = starts_[side_];
    current_.order = order_[side_];
    side_ = 1 - side_;
  }

 private:
  Grouping current_;
  int32_t* counts_;
  uint16_t* places_;
  int32_t* starts_[2];
  int32_t* order_[2];
  int side_ = 0;
};

}  // namespace fff::cuda
