// Hard tree, forward, of many tokens: products on the matrix units.
//
// The levels are cut into slabs of 5 or 6. Tokens that enter a slab by the same node share its
// nodes, at most 63, so their scores are one product [tokens, input_width] x [input_width, nodes];
// each token then finds its path in shared memory, and tokens are grouped anew by where they leave.
// Tokens of one group of the last grouping share the nodes of all slabs that they came through, so
// that the output is one product too: of their gates, zero off each path, with the nodes' output
// rows. Leaf networks are such products with the neurons of a few leaves that fill a tile's
// columns.
//
// docs/cuda.md has the figures.
#pragma once

#include <algorithm>

#include "decision.h"
#include "grouping.cuh"
#include "matrix_tile.cuh"

namespace fff::cuda {

// Most levels of a slab: its gates, in shared memory, are twice as wide for tf32.
template <typename T>
inline constexpr int kSlabLevels = sizeof(T) == 2 ? 6 : 5;
inline constexpr int kLeafColumns = 64;  // neurons of a tile in leaf networks

// How levels and leaves are cut.
struct Slabs {
  int levels;
  int count;       // that all levels are cut into
  int used;        // how many of them are products, 1 ... count
  int unit;        // log2 of the leaves that a tile of the last grouping shares, if there are any
  int last_level;  // of the last grouping

  Slabs(const TreeShape& s, int most_levels, int wanted)
      : levels(s.levels),
        count(s.levels > most_levels ? (s.levels - 1) / most_levels + 1 : 1),
        used(std::min(wanted, count)),
        unit(0) {
    const int most = s.decisions - begin(used - 1);
    while (unit < most && (s.leaf_width << (unit + 1)) <= kLeafColumns) {
      ++unit;
    }
    last_level = has_leaves(s) ? s.decisions - unit : begin(used - 1);
  }

  FFF_HOST_DEVICE int begin(int slab) const { return (levels * slab + count - 1) / count; }
  FFF_HOST_DEVICE int size(int slab) const { return begin(slab + 1) - begin(slab); }
  // Whether leaf networks are products too.
  FFF_HOST_DEVICE bool has_leaves(const TreeShape& s) const {
    return s.leaf_width > 0 && used == count;
  }
  FFF_HOST_DEVICE int64_t neurons(const TreeShape& s) const {  // of a tile
    return has_leaves(s) ? s.leaf_width << unit : 0;
  }
};

// The nodes that a slab has below one of its first level's, in heap order: a node's slot.
struct SlabNodes {
  TreeShape shape;
  int64_t tree;
  int64_t position;  // of the topmost among the nodes of its level
  int level;         // the topmost's
  int levels;

  FFF_DEVICE int count() const { return (1 << levels) - 1; }
  // Among the rows of all trees.
  FFF_DEVICE int64_t row(int slot) const {
    const int below = highest_bit(static_cast<uint32_t>(slot) + 1);
    return tree * shape.nodes() + (int64_t(1) << (level + below)) - 1 + (position << below) +
           (slot + 1 - (1 << below));
  }
};

template <typename T>
FFF_DEVICE const T* row_or_null(const void* array, int64_t row, int64_t width, bool present) {
  return present ? static_cast<const T*>(array) + row * width : nullptr;
}

// Scores, decisions and positions of one slab; a block has a tile of the grouping by its topmost
// nodes.
template <typename T, int kSlots>
struct ScoreSlab {
  static constexpr int kThreads = kTileThreads;
  static constexpr int kBlocksPerProcessor = 2;
  using Dots = DotTile<T, kSlots>;
  static constexpr int64_t kBiasBytes = kSlots * sizeof(float);
  static constexpr int64_t kSharedBytes = Dots::kSharedBytes + kBiasBytes + Children::kSharedBytes;
  TreeForward p;
  Grouping grouping;
  int levels;         // of the slab
  bool regroups;      // afterwards
  Children children;  // if it does

  FFF_DEVICE void operator()(int64_t block) const {
    const Tile tile = grouping.tile(block);
    unsigned char* const shared = shared_memory();
    const int child = tile.count > 0 ? score(tile, shared) : -1;
    if (regroups) {
      children.record(tile, child, shared + Dots::kSharedBytes + kBiasBytes);
    }
  }

 private:
  // Where this thread's token goes on; -1 if it has none.
  FFF_DEVICE int score(const Tile& tile, unsigned char* shared) const {
    const TreeShape& s = p.shape;
    float* const biases = reinterpret_cast<float*>(shared + Dots::kSharedBytes);
    const SlabNodes nodes = {s, grouping.tree(tile.group), grouping.position(tile.group),
                             grouping.level, levels};
    const int i = thread_index();
    if (i < kSlots) {
      const bool present = p.weights.node_bias && i < nodes.count();
      biases[i] = present
                      ? static_cast<float>(static_cast<const T*>(p.weights.node_bias)[nodes.row(i)])
                      : 0.0f;
    }
    const StagedRows<T, kTileRows> x(
        [&](int row) {
          const bool present = row < tile.count;
          const int64_t token = present ? grouping.token(tile, row) : 0;
          return row_or_null<T>(p.x, token, s.input_width, present);
        },
        p.x, s.input_width);
    const StagedRows<T, kSlots> weights(
        [&](int slot) {
          const bool present = slot < nodes.count();
          return row_or_null<T>(p.weights.node_weight, present ? nodes.row(slot) : 0, s.input_width,
                                present);
        },
        p.weights.node_weight, s.input_width);
    const float* scores = Dots::run(shared, x, weights, s.input_width);
    return i < tile.count
               ? descend(nodes, grouping.token(tile, i), scores + i * Dots::kPitch, biases)
               : -1;
  }

  // Where the token goes on in the next grouping, below the topmost node.
  FFF_DEVICE int descend(const SlabNodes& nodes, int64_t token, const float* scores,
                         const float* biases) const {
    const TreeShape& s = p.shape;
    const int64_t pair = token * s.trees + nodes.tree;
    int slot = 0;
    int position = 0;
    int decided = 0;
    for (int level = 0; level < levels; ++level) {
      const float score = scores[slot] + biases[slot];
      const int64_t i = pair * s.levels + nodes.level + level;
      static_cast<float*>(p.scores)[i] = score;
      if (nodes.level + level < s.decisions) {
        const int right = goes_right(p, score, i);
        slot = 2 * slot + 1 + right;
        position = 2 * position + right;
        ++decided;
      }
    }
    p.leaf[pair] = (nodes.position << decided) + position;
    return regroups ? position >> (decided - children.levels) : 0;
  }
};

// Scaled activations of the leaf networks' neurons; a block has a tile of the last grouping and 64
// of the neurons that it shares.
template <typename T>
struct LeafHidden {
  static constexpr int kThreads = kTileThreads;
  static constexpr int kBlocksPerProcessor = 2;
  using Dots = DotTile<T, kLeafColumns>;
  static constexpr int64_t kSharedBytes = Dots::kSharedBytes;
  TreeForward p;
  Grouping grouping;
  Slabs slabs;
  T* hidden;  // [tokens, trees, leaf_width]

  FFF_HOST_DEVICE int64_t column_blocks() const {
    return (slabs.neurons(p.shape) + kLeafColumns - 1) / kLeafColumns;
  }

  FFF_DEVICE void operator()(int64_t block) const {
    const Tile tile = grouping.tile(block / column_blocks());
    if (tile.count == 0) {
      return;
    }
    const TreeShape& s = p.shape;
    const int64_t neurons = slabs.neurons(s);
    const int64_t first_neuron = tile.group * neurons;  // of the unit, among all trees'
    const int64_t first = block % column_blocks() * kLeafColumns;
    const StagedRows<T, kTileRows> x(
        [&](int row) {
          const bool present = row < tile.count;
          const int64_t token = present ? grouping.token(tile, row) : 0;
          return row_or_null<T>(p.x, token, s.input_width, present);
        },
        p.x, s.input_width);
    const StagedRows<T, kLeafColumns> weights(
        [&](int column) {
          return row_or_null<T>(p.weights.w1, first_neuron + first + column, s.input_width,
                                first + column < neurons);
        },
        p.weights.w1, s.input_width);
    const float* sums = Dots::run(shared_memory(), x, weights, s.input_width);

    const T* bias = static_cast<const T*>(p.weights.b1);
    const float* scale = static_cast<const float*>(p.leaf_scale);
    for (int i = thread_index(); i < tile.count * kLeafColumns; i += kThreads) {
      const int row = i / kLeafColumns, column = i % kLeafColumns;
      const int64_t pair = grouping.token(tile, row) * s.trees + grouping.tree(tile.group);
      const int64_t leaf = p.leaf[pair] & ((int64_t(1) << slabs.unit) - 1);
      const int64_t j = first + column - leaf * s.leaf_width;
      if (j >= 0 && j < s.leaf_width) {
        float sum = sums[row * Dots::kPitch + column];
        sum += bias ? static_cast<float>(bias[first_neuron + first + column]) : 0.0f;
        sum = activate(p.leaf_activation, sum);
        sum *= scale ? scale[pair * s.leaf_width + j] : 1.0f;
        hidden[pair * s.leaf_width + j] = static_cast<T>(sum);
      }
    }
  }
};

// Some columns of the output of a tile of the last grouping, from trees `tree_begin`... `tree_end`:
// a sum over parts, each of which has kSlots gates, nodes of a slab or neurons of leaf networks.
template <typename T, int kSlots>
struct OutputTile {
  static constexpr int kThreads = kTileThreads;
  static constexpr int kBlocksPerProcessor = 2;
  static constexpr int kRowBytes = 256;  // of output rows, at a time
  static constexpr int kColumns = kRowBytes / static_cast<int>(sizeof(T));
  using Sums = WarpTile<T, kColumns>;
  // Half of a warp reads consecutive elements of two rows where it cannot read them transposed.
  static constexpr int kPitch = kRowBytes + (sizeof(T) == 2 ? kRowPad : 2 * kRowPad);
  static constexpr int kGatePitch = kSlots * static_cast<int>(sizeof(T)) + kRowPad;
  static constexpr int kGateBytes = kTileTokens * kGatePitch;
  static constexpr int kBufferBytes = kGateBytes + kSlots * kPitch;
  static constexpr int kResultPitch = Sums::kWarpColumns + 8;  // floats
  static constexpr int kResults = 16 * kResultPitch;           // floats of a warp, at a time
  static constexpr int kResultBytes = kThreads / kWarpSize * kResults * sizeof(float);
  static constexpr int64_t kSharedBytes =
      2 * kBufferBytes + kResultBytes + kTileTokens * sizeof(int);
  TreeForward p;
  Grouping grouping;
  Slabs slabs;
  const T* hidden;  // [tokens, trees, leaf_width]
  int64_t first_tile;
  int64_t tree_begin, tree_end;  // several only if the grouping's level is 0
  bool adds;                     // to what the output has
  int64_t column_blocks;         // blocks that share the columns of a tile of tokens

  FFF_HOST_DEVICE static int64_t column_tiles(int64_t width) {
    return (width + kColumns - 1) / kColumns;
  }

  FFF_DEVICE void operator()(int64_t block) const {
    const Tile tile = grouping.tile(first_tile + block / column_blocks);
    if (tile.count == 0) {
      return;
    }
    unsigned char* const shared = shared_memory();
    if (thread_index() < kTileTokens) {
      const bool present = thread_index() < tile.count;
      tokens()[thread_index()] =
          present ? static_cast<int>(grouping.token(tile, thread_index())) : 0;
    }
    sync_threads();
    const int64_t own_columns = block % column_blocks;
    const int64_t all_columns = column_tiles(p.shape.output_width);
    const int begin = static_cast<int>(all_columns * own_columns / column_blocks);
    const int end = static_cast<int>(all_columns * (own_columns + 1) / column_blocks);
    const int node_parts = p.weights.node_output ? slabs.used : 0;
    const int leaf_parts = static_cast<int>((slabs.neurons(p.shape) + kSlots - 1) / kSlots);
    const int parts_of_tree = node_parts + leaf_parts;
    const int parts = static_cast<int>(tree_end - tree_begin) * parts_of_tree;
    const bool gates_stay = parts <= 2;
    const auto gates_at = [&](int side) { return shared + side * kBufferBytes; };
    const auto rows_at = [&](int side) { return shared + side * kBufferBytes + kGateBytes; };
    const auto stage_rows = [&](int part, int columns, int side) {
      const int64_t column = int64_t(columns) * kColumns;
      const int64_t tree = tree_begin + part / parts_of_tree;
      const int own = part % parts_of_tree;
      if (own < node_parts) {
        stage_node_rows(tile, tree, own, column, rows_at(side));
      } else {
        stage_leaf_rows(tile, tree, (own - node_parts) * kSlots, column, rows_at(side));
      }
      commit_copies();
    };
    const auto store_gates = [&](int part, int side) {
      const int64_t tree = tree_begin + part / parts_of_tree;
      const int own = part % parts_of_tree;
      if (own < node_parts) {
        store_node_gates(tile, tree, own, gates_at(side));
      } else {
        store_leaf_gates(tile, tree, (own - node_parts) * kSlots, gates_at(side));
      }
    };

    if (parts > 0 && begin < end) {
      stage_rows(0, begin, 0);
      store_gates(0, 0);
    }
    int side = 0, stored = 1;  // parts whose gates were made
    for (int columns = begin; columns < end; ++columns) {
      Sums sums(!p.allow_tf32);
      for (int part = 0; part < parts; ++part) {
        wait_for_copies<0>();
        sync_threads();  // the part is here, and the one before it is free
        const int next = part + 1 < parts ? part + 1 : 0;
        const int next_columns = next > 0 ? columns : columns + 1;
        if (next_columns < end) {
          stage_rows(next, next_columns, 1 - side);
        }
        const unsigned char* const gates = gates_at(gates_stay ? part : side);
        const unsigned char* const rows = rows_at(side);
        constexpr int kRows = 32 / static_cast<int>(sizeof(T));
        FFF_UNROLL_BY(2)  // more would want more registers than there are
        for (int k = 0; k < kSlots / kRows; ++k) {
          sums.add_columns(gates + k * 32, kGatePitch, rows + k * kRows * kPitch, kPitch);
        }
        if (stored < parts || (!gates_stay && next_columns < end)) {
          store_gates(next, gates_stay ? next : 1 - side);
          ++stored;
        }
        side = 1 - side;
      }
      if (p.output_dtype == p.dtype) {
        write<T>(tile, int64_t(columns) * kColumns, sums);
      } else {
        write<float>(tile, int64_t(columns) * kColumns, sums);
      }
    }
  }

 private:
  // Of the tile's rows; in shared memory, for they are asked for again and again.
  FFF_DEVICE static int* tokens() {
    return reinterpret_cast<int*>(shared_memory() + 2 * kBufferBytes + kResultBytes);
  }
  FFF_DEVICE int64_t pair(int row, int64_t tree) const {
    return tokens()[row] * p.shape.trees + tree;
  }

  template <typename RowAt>
  FFF_DEVICE void stage(unsigned char* shared, int64_t column, const void* array,
                        const RowAt& row_at) const {
    constexpr int kChunks = kRowBytes / 16;
    const int64_t width = p.shape.output_width;
    const bool aligned = is_aligned(array, width * static_cast<int64_t>(sizeof(T)));
    const int own = thread_index() % kChunks;
    const RowChunk<T> chunk(column + own * kPerChunk<T>, width, aligned);
    for (int slot = thread_index() / kChunks; slot < kSlots; slot += kThreads / kChunks) {
      chunk.stage(shared + slot * kPitch + own * 16, row_at(slot));
    }
  }
  FFF_DEVICE void stage_node_rows(const Tile& tile, int64_t tree, int slab, int64_t column,
                                  unsigned char* shared) const {
    const int level = slabs.begin(slab);
    const int64_t position = grouping.position(tile.group) >> (grouping.level - level);
    const SlabNodes nodes = {p.shape, tree, position, level, slabs.size(slab)};
    stage(shared, column, p.weights.node_output, [&](int slot) {
      const bool present = slot < nodes.count();
      return row_or_null<T>(p.weights.node_output, present ? nodes.row(slot) : 0,
                            p.shape.output_width, present);
    });
  }
  FFF_DEVICE void stage_leaf_rows(const Tile& tile, int64_t tree, int64_t first, int64_t column,
                                  unsigned char* shared) const {
    const int64_t neurons = slabs.neurons(p.shape);
    const int64_t unit = (tree << grouping.level) + grouping.position(tile.group);
    stage(shared, column, p.weights.w2, [&](int slot) {
      return row_or_null<T>(p.weights.w2, unit * neurons + first + slot, p.shape.output_width,
                            first + slot < neurons);
    });
  }

  // Two threads have one token's gates.
  static constexpr int kThreadsPerToken = kThreads / kTileTokens;
  static constexpr int kOwnSlots = kSlots / kThreadsPerToken;
  FFF_DEVICE static int own_row() { return thread_index() / kThreadsPerToken; }
  FFF_DEVICE static int own_slot() { return thread_index() % kThreadsPerToken * kOwnSlots; }

  FFF_DEVICE void store_node_gates(const Tile& tile, int64_t tree, int slab,
                                   unsigned char* gates) const {
    const TreeShape& s = p.shape;
    T* const to = reinterpret_cast<T*>(gates + own_row() * kGatePitch) + own_slot();
    for (int i = 0; i < kOwnSlots; i += kPerChunk<T>) {
      store_chunk(to + i, Chunk{});
    }
    if (own_row() >= tile.count) {
      return;
    }
    const int64_t i = pair(own_row(), tree);
    const int64_t leaf = p.leaf[i];
    const int end = slabs.begin(slabs.used);
    const int decided = end < s.decisions ? end : s.decisions;  // bits of it
    for (int below = 0; below < slabs.size(slab); ++below) {
      const int level = slabs.begin(slab) + below;
      const int64_t position = leaf >> (decided - level);
      const int first = (1 << below) - 1;  // slot of the level
      const int slot = first + (static_cast<int>(position) & first) - own_slot();
      if (slot >= 0 && slot < kOwnSlots) {
        const float score = static_cast<const float*>(p.scores)[i * s.levels + level];
        to[slot] = static_cast<T>(activate(p.node_activation, score));
      }
    }
  }
  FFF_DEVICE void store_leaf_gates(const Tile& tile, int64_t tree, int64_t first,
                                   unsigned char* gates) const {
    const int64_t width = p.shape.leaf_width;
    T* const to = reinterpret_cast<T*>(gates + own_row() * kGatePitch) + own_slot();
    const bool present = own_row() < tile.count;
    const int64_t i = present ? pair(own_row(), tree) : 0;
    const int64_t leaf = present ? p.leaf[i] & ((int64_t(1) << slabs.unit) - 1) : 0;
    for (int slot = 0; slot < kOwnSlots; ++slot) {
      const int64_t j = first + own_slot() + slot - leaf * width;
      to[slot] = present && j >= 0 && j < width ? hidden[i * width + j] : static_cast<T>(0.0f);
    }
  }

  // Adds b2 of the leaves that a row's token reached.
  FFF_DEVICE void add_biases(float (&values)[kPerChunk<T>], int row, int64_t first,
                             int64_t count) const {
    const int64_t width = p.shape.output_width;
    const bool aligned = is_aligned(p.weights.b2, width * static_cast<int64_t>(sizeof(T)));
    for (int64_t tree = tree_begin; tree < tree_end; ++tree) {
      const int64_t leaf = tree * p.shape.leaves() + p.leaf[pair(row, tree)];
      const auto e = Elements<T>::load(static_cast<const T*>(p.weights.b2) + leaf * width + first,
                                       count, aligned);
      FFF_UNROLL
      for (int i = 0; i < kPerChunk<T>; ++i) {
        values[i] += static_cast<float>(e.values[i]);
      }
    }
  }

  // A warp's sums. Adds biases, and what is there already if wanted.
  template <typename O>
  FFF_DEVICE void write(const Tile& tile, int64_t column, const Sums& sums) const {
    constexpr int kChunks = Sums::kWarpColumns / kPerChunk<T>;
    float* const results =
        reinterpret_cast<float*>(shared_memory() + 2 * kBufferBytes) + warp_index() * kResults;
    const int64_t width = p.shape.output_width;
    const bool aligned = is_aligned(p.output, width * static_cast<int64_t>(sizeof(O)));
    const bool biased = p.weights.b2 && slabs.has_leaves(p.shape);
    const int own = lane_index() % kChunks * kPerChunk<T>;
    const int64_t first = column + Sums::column() + own;
    FFF_UNROLL
    for (int half = 0; half < 2; ++half) {
      sync_warp();  // what was here was written
      sums.store_half(half, results, kResultPitch);
      sync_warp();
      for (int i = lane_index() / kChunks; i < 16; i += kWarpSize / kChunks) {
        const int row = Sums::row() + half * 16 + i;
        if (row >= tile.count || first >= width) {
          break;
        }
        float values[kPerChunk<T>];
        load_floats(values, results + i * kResultPitch + own);
        if (biased) {
          add_biases(values, row, first, width - first);
        }
        store_sums(static_cast<O*>(p.output) + tokens()[row] * width + first, values, width - first,
                   aligned, adds);
      }
    }
  }
};

namespace pipeline {

// The product with output rows, of the last grouping.
template <typename T, int kSlots, typename Queue>
void tree_output_slabs(const TreeForward& p, const Grouping& grouping, const Slabs& slabs,
                       const T* hidden, Queue& queue) {
  const TreeShape& s = p.shape;
  // Each tree has its own groups, so that trees take turns to add to the output, unless all are at
  // their roots still.
  using Output = OutputTile<T, kSlots>;
  const int64_t together = grouping.level == 0 ? s.trees : 1;
  for (int64_t tree = 0; tree < s.trees; tree += together) {
    const int64_t first = grouping.tiles_before(tree);
    const int64_t tiles = grouping.tiles_before(tree + 1) - first;
    // Gates are made once in a block, so that blocks have as many columns as leaves enough of them.
    const int64_t column_blocks =
        std::min((queue.kBusyBlocks + tiles - 1) / std::max<int64_t>(tiles, 1),
                 Output::column_tiles(s.output_width));
    const Output output = {p,    grouping,        slabs,    hidden,       first,
                           tree, tree + together, tree > 0, column_blocks};
    queue.launch(output, tiles * column_blocks, output.kSharedBytes);
  }
}

// The levels of the slabs that are used: their scores, the position after them as the leaf, and
// what they and, if all are used, the leaf networks contribute to the output.
template <typename T, int kSlots, typename Queue>
void tree_forward_slabs(const TreeForward& p, const Slabs& slabs, Queue& queue) {
  const TreeShape& s = p.shape;
  const bool networks = p.output && slabs.has_leaves(s);
  T* const hidden = queue.template array<T>(networks ? s.tokens * s.trees * s.leaf_width : 0);
  Groupings groupings({s.tokens, s.trees, 0, nullptr, nullptr}, kSlabLevels<T>, slabs.last_level,
                      queue);
  for (int slab = 0; slab < slabs.used; ++slab) {
    const int begin = slabs.begin(slab);
    const bool last = slab + 1 == slabs.used;
    const int next = !last ? slabs.begin(slab + 1) : networks ? slabs.last_level : begin;
    const Children children = groupings.children(next - begin);
    const Grouping& grouping = groupings.current();
    using Scores = ScoreSlab<T, kSlots>;
    queue.launch(Scores{p, grouping, slabs.size(slab), next > begin, children}, grouping.tiles(),
                 Scores::kSharedBytes);
    if (next > begin) {
      groupings.next(children, queue);
    }
  }
  const Grouping& grouping = groupings.current();
  if (networks) {
    const LeafHidden<T> body = {p, grouping, slabs, hidden};
    queue.launch(body, grouping.tiles() * body.column_blocks(), body.kSharedBytes);
  }
  if (!networks && !(p.output && p.weights.node_output)) {
    return;
  }
  tree_output_slabs<T, kSlots>(p, grouping, slabs, hidden, queue);
}

// T: a float type of the matrix units; float means tf32.
template <typename T, typename Queue>
void tree_forward_slabs(const TreeForward& p, const Slabs& slabs, Queue& queue) {
  if constexpr (kSlabLevels<T> > 5) {
    if (slabs.size(0) > 5) {
      return tree_forward_slabs<T, 64>(p, slabs, queue);
    }
  }
  tree_forward_slabs<T, 32>(p, slabs, queue);
}

}  // namespace pipeline

}  // namespace fff::cuda
