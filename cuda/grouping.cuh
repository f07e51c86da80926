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
  FFF_DEVICE int64_t token(int64_t pair) const {
    return order ? order[pair] : static_cast<uint32_t>(pair) % static_cast<uint32_t>(tokens);
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

  static constexpr uint16_t kNowhere = 0xffff;

  FFF_HOST_DEVICE int64_t children() const { return int64_t(1) << levels; }
  FFF_DEVICE int64_t index(const Tile& tile, int64_t child) const {
    return tile.group_begin * children() + child * tile.group_tiles + tile.in_group;
  }

  // Called by all threads of a block, of which there are at least `children`; thread i < tile.count
  // says where pair i goes, in `child_of` in shared memory; below 0, it is left out.
  FFF_DEVICE void record(const Tile& tile, const int* child_of) const {
    if (tile.in_group >= tile.group_tiles) {
      return;  // pairs were left out before, so that there are blocks behind the last tile
    }
    const int i = thread_index();
    int before = 0, equal = 0;
    for (int j = 0; j < tile.count; ++j) {
      before += j < i && child_of[j] == child_of[i < tile.count ? i : 0];
      equal += child_of[j] == i;
    }
    if (i < tile.count) {
      places[tile.first + i] =
          child_of[i] < 0 ? kNowhere : static_cast<uint16_t>(child_of[i] * kTileTokens + before);
    }
    if (i < children()) {
      counts[index(tile, i)] = equal;
    }
  }
};

// The next grouping from the running sums of `counts`, which are the pairs' places in it.
struct Regroup {
  static constexpr int kThreads = kTileTokens;
  static constexpr int kBlocksPerProcessor = 1;
  Grouping from;
  Children children;
  int32_t* starts;
  int32_t* order;

  FFF_DEVICE void operator()() const {
    const Tile tile = from.tile(block_index());
    const int i = thread_index();
    const int place = i < tile.count ? children.places[tile.first + i] : Children::kNowhere;
    if (place != Children::kNowhere) {
      const int64_t sum = children.counts[children.index(tile, place / kTileTokens)];
      order[sum + place % kTileTokens] = static_cast<int32_t>(from.token(tile.first + i));
    }
    if (tile.in_group == 0 && i < children.children()) {
      starts[tile.group * children.children() + i] = children.counts[children.index(tile, i)];
    }
    if (tile.in_group == 0 && tile.group == from.groups() - 1 && i == 0) {
      const int64_t end = tile.group_begin + tile.group_tiles;
      starts[from.groups() * children.children()] = children.counts[end * children.children()];
    }
  }
};

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
    queue.exclusive_sum(counts_, current_.tiles() * children.children() + 1);
    queue.launch(Regroup{current_, children, starts_[side_], order_[side_]}, current_.tiles(), 0);
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
