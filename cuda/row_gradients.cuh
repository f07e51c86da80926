// Gradients of rows of weights that a group's pairs share: sums over the pairs of gate x vector, as
// products [gates, pairs] x [pairs, width] on the matrix units.
//
// A range of up to 512 pairs of a group is one block's; the sums of longer groups are parts, which
// a second kernel adds in order, so that a leaf that takes all tokens keeps no block busy for long.
#pragma once

#include <algorithm>
#include <vector>

#include "grouping.cuh"
#include "matrix_tile.cuh"
#include "side_by_side.cuh"
#include "tree_slabs.cuh"

namespace fff::cuda {

inline constexpr int kRangeTokens = 512;
inline constexpr int64_t kPartElements = int64_t(1) << 26;  // that suit the workspace: 256 MiB

// The gates of a slab's nodes. A pair has one at each level.
template <typename T>
struct NodeGates {
  static constexpr int kSlots = 1 << kSlabLevels<T>;  // of a block
  TreeShape shape;
  Grouping grouping;    // by the topmost nodes
  int levels;           // of the slab
  const int64_t* leaf;  // [tokens, trees]
  const float* values;  // [tokens, trees, all levels]

  FFF_HOST_DEVICE int64_t slots() const { return (int64_t(1) << levels) - 1; }
  FFF_DEVICE int64_t row(int64_t group, int64_t slot) const {
    return SlabNodes{shape, grouping.tree(group), grouping.position(group), grouping.level, levels}
        .row(static_cast<int>(slot));
  }

  // What is loaded of a pair, some time before it is used.
  struct Own {
    int64_t leaf;
    float values[kSlabLevels<T>];
  };
  FFF_DEVICE Own load(int64_t pair) const {
    Own own = {leaf[pair], {}};
    FFF_UNROLL
    for (int below = 0; below < kSlabLevels<T>; ++below) {
      if (below < levels) {
        own.values[below] = values[pair * shape.levels + grouping.level + below];
      }
    }
    return own;
  }

  // Calls put(slot, gate) for those of a pair that are not 0 and lie in [first, end).
  template <typename Put>
  FFF_DEVICE void for_each(const Own& own, int64_t, int64_t first, int64_t end,
                           const Put& put) const {
    FFF_UNROLL
    for (int below = 0; below < kSlabLevels<T>; ++below) {
      if (below < levels) {
        const int before = (1 << below) - 1;  // slots of the levels above
        const int64_t position = own.leaf >> (shape.decisions - grouping.level - below);
        const int64_t slot = before + (position & before);
        if (slot >= first && slot < end) {
          put(slot, static_cast<T>(own.values[below]));
        }
      }
    }
  }
};

// The gates of the leaf networks' neurons, `width` of each leaf.
template <typename T>
struct LeafGates {
  static constexpr int kSlots = kLeafColumns;
  TreeShape shape;
  Grouping grouping;  // by `unit` levels of leaves
  int unit;
  const int64_t* leaf;  // [tokens, trees]
  const T* values;      // [tokens, trees, width]; null: all 1
  int64_t width;

  FFF_HOST_DEVICE int64_t slots() const { return width << unit; }
  FFF_DEVICE int64_t row(int64_t group, int64_t slot) const { return group * slots() + slot; }

  struct Own {
    int64_t leaf;
  };
  FFF_DEVICE Own load(int64_t pair) const { return {leaf[pair]}; }

  template <typename Put>
  FFF_DEVICE void for_each(const Own& own, int64_t pair, int64_t first, int64_t end,
                           const Put& put) const {
    const int64_t begin = (own.leaf & ((int64_t(1) << unit) - 1)) * width;
    const int64_t last = begin + width < end ? begin + width : end;
    for (int64_t slot = begin > first ? begin : first; slot < last; ++slot) {
      put(slot, values ? values[pair * width + slot - begin] : static_cast<T>(1.0f));
    }
  }
};

// Where sums over ranges lie until they are added. A group of more than one range has a part for
// each: twice the number of the aligned 512 pairs in which the range begins, and 1 more for a
// group's first. No two are the same: two ranges that begin in the same aligned 512 are the first
// of a group and a later one of the group before.
struct Parts {
  float* rows = nullptr;    // [parts, slots, width]
  float* biases = nullptr;  // [parts, slots]

  static int64_t count(int64_t pairs) { return 2 * (pairs / kRangeTokens + 1); }
  FFF_DEVICE static int64_t part(int64_t group_start, int64_t range) {
    return 2 * (group_start / kRangeTokens + range) + (range == 0);
  }
};

// Those of one weight; every row is written.
template <typename T, template <typename> typename Gates>
struct RowGradients {
  static constexpr int kSlots = Gates<T>::kSlots;
  static constexpr int kThreads = 2 * kSlots;
  static constexpr int kBlocksPerProcessor = 3;
  static constexpr int kTokens = kSlots;  // at a time
  static constexpr int kRowBytes = 256;   // of vectors, at a time
  static constexpr int kColumns = kRowBytes / static_cast<int>(sizeof(T));
  // Half of a warp reads consecutive elements of two rows where it cannot read them transposed.
  static constexpr int kPad = sizeof(T) == 2 ? kRowPad : 2 * kRowPad;
  static constexpr int kPitch = kRowBytes + kPad;
  static constexpr int kGatePitch = kSlots * static_cast<int>(sizeof(T)) + kPad;
  static constexpr int kGateBytes = kTokens * kGatePitch;
  static constexpr int kBufferBytes = kGateBytes + kTokens * kPitch;
  static constexpr int kResultPitch = kColumns + 8;  // floats
  static constexpr int64_t kSharedBytes = 2 * kBufferBytes;
  static_assert(kSlots * kResultPitch * sizeof(float) <= kSharedBytes);
  Gates<T> gates;
  const T* vectors;  // [tokens, width]
  int64_t width;
  bool whole_floats;  // or rounded to tf32
  // outputs, each null when not wanted
  void* gradient;  // [rows, width] of `dtype`
  void* bias;      // [rows] of `dtype`
  DType dtype;     // T's or float
  bool adds;       // to what the outputs, of float, have
  Parts parts;

  // To an output.
  FFF_DEVICE void put(void* array, int64_t i, float value) const {
    store<T>(array, dtype, kDType<T>, i, value + (adds ? static_cast<const float*>(array)[i] : 0));
  }

  FFF_HOST_DEVICE int64_t slot_blocks() const { return (gates.slots() + kSlots - 1) / kSlots; }
  FFF_HOST_DEVICE int64_t column_blocks() const {
    return width > 0 ? (width + kColumns - 1) / kColumns : 1;
  }
  int64_t blocks() const {
    return gates.grouping.template tiles<kRangeTokens>() * slot_blocks() * column_blocks();
  }

  FFF_DEVICE void operator()(int64_t block) const {
    const int64_t column = block % column_blocks() * kColumns;
    const int64_t first_slot = block / column_blocks() % slot_blocks() * kSlots;
    const Tile range =
        gates.grouping.template tile<kRangeTokens>(block / (column_blocks() * slot_blocks()));
    if (range.count == 0 && (range.in_group > 0 || adds)) {
      return;
    }
    unsigned char* const shared = shared_memory();
    const int steps = (range.count + kTokens - 1) / kTokens;
    const bool aligned = is_aligned(vectors, width * static_cast<int64_t>(sizeof(T)));
    const auto gates_of = [&](int step) { return shared + step % 2 * kBufferBytes; };
    const auto stage = [&](int step) {
      stage_vectors(range, step, column, aligned, gates_of(step) + kGateBytes);
      commit_copies();
    };

    if (steps > 0) {
      stage(0);
      store_gates(load_gates(range, 0), first_slot, gates_of(0));
    }
    WarpTile<T, kColumns> sums(whole_floats);
    float bias_sum = 0.0f;
    for (int step = 0; step < steps; ++step) {
      wait_for_copies<0>();
      sync_threads();  // the step is here, and the one before it is free
      OwnGates next = {};
      if (step + 1 < steps) {
        stage(step + 1);
        next = load_gates(range, step + 1);
      }
      const unsigned char* const from = gates_of(step);
      constexpr int kRows = 32 / static_cast<int>(sizeof(T));
      FFF_UNROLL
      for (int k = 0; k < kTokens / kRows; ++k) {
        sums.add_outer(from + k * kRows * kGatePitch, kGatePitch,
                       from + kGateBytes + k * kRows * kPitch, kPitch);
      }
      if (bias && column == 0 && thread_index() < kSlots) {
        bias_sum += sum_of_gates(from);
      }
      if (step + 1 < steps) {
        store_gates(next, first_slot, gates_of(step + 1));
      }
    }
    sync_threads();
    float* const results = reinterpret_cast<float*>(shared);
    sums.store(results, kResultPitch);
    sync_threads();
    write(range, first_slot, column, results, bias_sum);
  }

 private:
  FFF_DEVICE void stage_vectors(const Tile& range, int step, int64_t column, bool aligned,
                                unsigned char* to) const {
    constexpr int kChunks = kRowBytes / 16;
    constexpr int kStride = kThreads / kChunks;
    const int own = thread_index() % kChunks;
    const RowChunk<T> chunk(column + own * kPerChunk<T>, width, aligned);
    FFF_UNROLL_BY(4)
    for (int i = 0; i < kTokens / kStride; ++i) {
      const int row = thread_index() / kChunks + i * kStride;
      const int pair = step * kTokens + row;
      const bool present = pair < range.count;
      const int64_t token = present ? gates.grouping.token(range, pair) : 0;
      chunk.stage(to + row * kPitch + own * 16, row_or_null<T>(vectors, token, width, present));
    }
  }

  // Two threads have one pair's gates, which are on the way while products are made.
  struct OwnGates {
    bool present;
    int64_t pair;
    typename Gates<T>::Own own;
  };
  FFF_DEVICE OwnGates load_gates(const Tile& range, int step) const {
    const int row = step * kTokens + thread_index() / 2;
    if (row >= range.count) {
      return {};
    }
    const int64_t token = gates.grouping.token(range, row);
    const int64_t pair = token * gates.shape.trees + gates.grouping.tree(range.group);
    return {true, pair, gates.load(pair)};
  }
  FFF_DEVICE void store_gates(const OwnGates& g, int64_t first_slot, unsigned char* to) const {
    constexpr int kOwn = kSlots / 2;
    T* const own =
        reinterpret_cast<T*>(to + thread_index() / 2 * kGatePitch) + thread_index() % 2 * kOwn;
    FFF_UNROLL
    for (int i = 0; i < kOwn; i += kPerChunk<T>) {
      store_chunk(own + i, Chunk{});
    }
    if (g.present) {
      const int64_t first = first_slot + thread_index() % 2 * kOwn;
      gates.for_each(g.own, g.pair, first, first + kOwn,
                     [&](int64_t slot, T gate) { own[slot - first] = gate; });
    }
  }

  FFF_DEVICE float sum_of_gates(const unsigned char* from) const {
    float sum = 0.0f;
    for (int row = 0; row < kTokens; ++row) {
      sum +=
          static_cast<float>(reinterpret_cast<const T*>(from + row * kGatePitch)[thread_index()]);
    }
    return sum;
  }

  FFF_DEVICE void write(const Tile& range, int64_t first_slot, int64_t column, const float* results,
                        float bias_sum) const {
    const int64_t start = gates.grouping.start(range.group);
    const bool whole = gates.grouping.start(range.group + 1) - start <= kRangeTokens;
    const int64_t part = Parts::part(start, range.in_group) * gates.slots() + first_slot;
    const int64_t left = gates.slots() - first_slot;
    const int slots = left < kSlots ? static_cast<int>(left) : kSlots;
    const auto row_of = [&](int slot) { return gates.row(range.group, first_slot + slot); };
    if (gradient && !whole) {
      const auto part_of = [&](int slot) { return part + slot; };
      write_rows(parts.rows, part_of, slots, column, results, false);
    } else if (gradient && dtype == kDType<T>) {
      write_rows(static_cast<T*>(gradient), row_of, slots, column, results, adds);
    } else if (gradient) {
      write_rows(static_cast<float*>(gradient), row_of, slots, column, results, adds);
    }
    if (bias && column == 0 && thread_index() < slots) {
      if (whole) {
        put(bias, row_of(thread_index()), bias_sum);
      } else {
        parts.biases[part + thread_index()] = bias_sum;
      }
    }
  }

  template <typename O, typename RowOf>
  FFF_DEVICE void write_rows(O* rows, const RowOf& row_of, int slots, int64_t column,
                             const float* results, bool to_what_is_there) const {
    constexpr int kChunks = kRowBytes / 16;
    const int own = thread_index() % kChunks * kPerChunk<T>;
    const int64_t first = column + own;
    const bool aligned = is_aligned(rows, width * static_cast<int64_t>(sizeof(O)));
    for (int slot = thread_index() / kChunks; slot < slots && first < width;
         slot += kThreads / kChunks) {
      float values[kPerChunk<T>];
      load_floats(values, results + slot * kResultPitch + own);
      store_sums(rows + row_of(slot) * width + first, values, width - first, aligned,
                 to_what_is_there);
    }
  }
};

// The sums over ranges of one group become those over the group; a block has 4 slots and 128
// columns of the group of several ranges, if there is one, that begins in its aligned 512 pairs.
template <typename Rows>
struct SumParts {
  static constexpr int kThreads = 128;
  static constexpr int kBlocksPerProcessor = 4;
  static constexpr int kOwnSlots = 4;
  static constexpr int64_t kSharedBytes = 0;
  Rows rows;

  FFF_HOST_DEVICE int64_t slot_blocks() const {
    return (rows.gates.slots() + kOwnSlots - 1) / kOwnSlots;
  }
  FFF_HOST_DEVICE int64_t column_blocks() const {
    return rows.width > 0 ? (rows.width + kThreads - 1) / kThreads : 1;
  }
  int64_t blocks() const {
    const int64_t starts = rows.gates.grouping.pairs() / kRangeTokens + 1;
    return starts * slot_blocks() * column_blocks();
  }

  FFF_DEVICE void operator()(int64_t block) const {
    const auto& gates = rows.gates;
    const int64_t width = rows.width;
    const int64_t column = block % column_blocks() * kThreads + thread_index();
    const int64_t first_slot = block / column_blocks() % slot_blocks() * kOwnSlots;
    const int64_t begin = block / (column_blocks() * slot_blocks()) * kRangeTokens;
    const Grouping& grouping = gates.grouping;
    const int64_t group =
        grouping.last_group([&](int64_t g) { return grouping.start(g) < begin + kRangeTokens; });
    const int64_t start = grouping.start(group), count = grouping.start(group + 1) - start;
    if (start < begin || start >= begin + kRangeTokens || count <= kRangeTokens) {
      return;
    }
    const int64_t ranges = (count + kRangeTokens - 1) / kRangeTokens;
    const int64_t left = gates.slots() - first_slot;
    const int slots = left < kOwnSlots ? static_cast<int>(left) : kOwnSlots;
    if (rows.gradient && column < width) {
      float sums[kOwnSlots] = {};
      FFF_UNROLL_BY(8)
      for (int64_t range = 0; range < ranges; ++range) {
        const int64_t part = Parts::part(start, range) * gates.slots() + first_slot;
        FFF_UNROLL
        for (int i = 0; i < kOwnSlots; ++i) {
          sums[i] += rows.parts.rows[(part + (i < slots ? i : 0)) * width + column];
        }
      }
      FFF_UNROLL
      for (int i = 0; i < kOwnSlots; ++i) {
        if (i < slots) {
          rows.put(rows.gradient, gates.row(group, first_slot + i) * width + column, sums[i]);
        }
      }
    }
    if (rows.bias && column < slots) {
      float sum = 0.0f;
      for (int64_t range = 0; range < ranges; ++range) {
        sum += rows.parts.biases[Parts::part(start, range) * gates.slots() + first_slot + column];
      }
      rows.put(rows.bias, gates.row(group, first_slot + column), sum);
    }
  }
};

namespace pipeline {

// Of several weights, whose parts find their memory here.
template <typename Rows, typename Queue>
void row_gradients(const std::vector<Rows>& weights, Queue& queue) {
  const auto part_rows = [](const Rows& rows) {
    const Grouping& grouping = rows.gates.grouping;
    return grouping.tokens > kRangeTokens ? Parts::count(grouping.pairs()) * rows.gates.slots() : 0;
  };
  // Together, as far as their parts suit the workspace.
  for (size_t next = 0; next < weights.size();) {
    queue.scope([&] {
      std::vector<Rows> together;
      std::vector<SumParts<Rows>> sums;
      int64_t elements = 0;
      for (; next < weights.size(); ++next) {
        Rows rows = weights[next];
        if (!rows.gradient && !rows.bias) {
          continue;
        }
        const int64_t parts = part_rows(rows);
        elements += parts * rows.width;
        if (!together.empty() && elements > kPartElements) {
          break;
        }
        rows.parts.rows = queue.template array<float>(rows.gradient ? parts * rows.width : 0);
        rows.parts.biases = queue.template array<float>(rows.bias ? parts : 0);
        together.push_back(rows);
        if (parts > 0) {
          sums.push_back({rows});
        }
      }
      launch_side_by_side(together, queue);
      launch_side_by_side(sums, queue);
    });
  }
}

}  // namespace pipeline

}  // namespace fff::cuda
