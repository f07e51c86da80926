// Hard tree, forward: which way suits a call.
#pragma once

#include "tree_slabs.cuh"
#include "tree_walk.cuh"

namespace fff::cuda {

inline constexpr int64_t kProcessors = 128;  // about, of a GPU

// How many slabs, of `most_levels`, are best computed as products; a walk does the rest. Products
// read rows that many tokens share, but all of a slab, visited or not; a walk reads visited ones.
// What either costs is rows read, the more where blocks are too few for all multiprocessors.
inline int best_slabs(const TreeForward& p, int most_levels) {
  const TreeShape& s = p.shape;
  const int64_t pairs = s.tokens * s.trees;
  const int64_t node_rows = p.weights.node_output && p.output ? 2 : 1;  // that a node has
  const int64_t neurons = p.output ? s.leaf_width : 0;
  const auto tiles_at = [&](int level) {
    return pairs / kTileTokens + std::min(pairs, s.trees << level);
  };
  const auto read = [](int64_t rows, int64_t blocks) {
    return blocks < kProcessors ? rows * kProcessors / blocks : rows;
  };
  int best = 0;
  int64_t least = pairs * (s.levels * node_rows + 2 * neurons);
  int64_t scores = 0, nodes = 0;  // rows read for scores, nodes of a tile, up to this slab
  const int count = Slabs(s, most_levels, 1).count;
  for (int used = 1; used <= count && s.tokens > kTileTokens; ++used) {
    const Slabs slabs(s, most_levels, used);
    const int64_t own = (int64_t(1) << slabs.size(used - 1)) - 1;
    const int64_t tiles = tiles_at(slabs.begin(used - 1)), last_tiles = tiles_at(slabs.last_level);
    scores += read(pairs + tiles * own, tiles);
    nodes += own;
    int64_t rows = scores + (node_rows - 1) * read(last_tiles * nodes, last_tiles);
    if (used < count) {
      rows += pairs * ((s.levels - slabs.begin(used)) * node_rows + 2 * neurons);
      rows += (node_rows - 1) * pairs;  // the output again
    } else if (neurons > 0) {
      rows += read(pairs + last_tiles * 2 * slabs.neurons(s), last_tiles);
    }
    if (rows < least) {
      least = rows;
      best = used;
    }
  }
  return best;
}

// The part of a call for some of its tokens.
template <typename T>
TreeForward some_tokens(TreeForward p, int64_t first, int64_t count) {
  const TreeShape& s = p.shape;
  const auto in = [&](const void* array, int64_t bytes) -> const void* {
    return array ? static_cast<const char*>(array) + first * bytes : nullptr;
  };
  const auto out = [&](void* array, int64_t bytes) -> void* {
    return array ? static_cast<char*>(array) + first * bytes : nullptr;
  };
  constexpr int64_t t = sizeof(T), a = sizeof(acc_t<T>);
  p.x = in(p.x, s.input_width * t);
  p.noise = in(p.noise, s.trees * s.levels * a);
  p.leaf_scale = in(p.leaf_scale, s.trees * s.leaf_width * a);
  p.output = out(p.output, s.output_width * (p.output_dtype == p.dtype ? t : a));
  p.scores = out(p.scores, s.trees * s.levels * a);
  p.leaf += first * s.trees;
  p.shape.tokens = count;
  return p;
}

namespace pipeline {

template <typename T, typename Queue>
void tree_forward_of_part(const TreeForward& p, Queue& queue) {
  constexpr int64_t kFewTokens = 256;
  constexpr int64_t kWideRow = 4096;  // bytes: looking far ahead reads too much
  const TreeShape& s = p.shape;
  int first_level = 0;
  bool adds = false;
  if constexpr (!std::is_same_v<T, double>) {
    const bool matrix_units = !std::is_same_v<T, float> || p.allow_tf32;
    if (const int used = matrix_units ? best_slabs(p, kSlabLevels<T>) : 0) {
      const Slabs slabs(s, kSlabLevels<T>, used);
      tree_forward_slabs<T>(p, slabs, queue);
      if (used == slabs.count) {
        return;
      }
      first_level = slabs.begin(used);
      adds = p.weights.node_output;
    }
  }
  if (s.tokens > kFewTokens || first_level > 0) {
    tree_forward_walk<T, 1, 1>(p, first_level, adds, 1, queue);
  } else if (s.input_width * static_cast<int64_t>(sizeof(T)) > kWideRow) {
    tree_forward_walk<T, 16, 2>(p, 0, false, kProcessors / s.tokens, queue);
  } else {
    tree_forward_walk<T, 16, 3>(p, 0, false, kProcessors / s.tokens, queue);
  }
}

// `most_pairs` of a token and a tree at a time: it bounds the workspace, and lets their indices be
// 32 bits wide.
template <typename T, typename Queue>
void tree_forward(const TreeForward& p, Queue& queue, int64_t most_pairs = int64_t(1) << 20) {
  const int64_t at_once = std::max<int64_t>(most_pairs / p.shape.trees, 1);
  for (int64_t first = 0; first < p.shape.tokens; first += at_once) {
    const int64_t count = std::min(at_once, p.shape.tokens - first);
    queue.scope([&] { tree_forward_of_part<T>(some_tokens<T>(p, first, count), queue); });
  }
}

}  // namespace pipeline

}  // namespace fff::cuda
