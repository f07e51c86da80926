// Hard tree, forward, token by token: a team of warps walks one token down its trees, then sums the
// output rows of what it met.
//
// A step scores all nodes of the next few levels below where the walk is, of several trees at once,
// so that their rows are on the way together and the memory's latency is paid once a step. Of few
// tokens each has a block, which looks ahead; of many each has a warp, which does not, for then it
// is the rows read that cost.
#pragma once

#include <algorithm>

#include "decision.h"
#include "rows.cuh"

namespace fff::cuda {

template <typename T, int kWarps, int kLevels>
struct WalkToken {
  using A = acc_t<T>;
  static constexpr int kThreads = kWarps > 4 ? kWarps * kWarpSize : 128;
  static constexpr int kBlocksPerProcessor = 1;
  static constexpr int kTeams = kThreads / (kWarps * kWarpSize);
  static constexpr int kTeamThreads = kThreads / kTeams;
  static constexpr int kTrees = kWarps > 1 ? 8 : 1;  // that step together
  static constexpr int kMostRows = kTrees << kLevels;
  static_assert(kWarps <= kMostRows);

  TreeForward p;
  int first_level;        // where the walk starts, from the positions in `leaf`
  bool adds;              // to what the output has
  int64_t column_blocks;  // teams for each token, of which each writes some columns
  A* gates;          // [tokens, column_blocks, trees, levels + leaf_width] what multiplies each row
  int64_t* reached;  // [tokens, column_blocks, trees] leaf

  struct Shared {
    A sums[kMostRows];
    int64_t position[kTrees];
  };
  static constexpr int64_t kSharedBytes = kTeams * sizeof(Shared);

  FFF_HOST_DEVICE int64_t teams() const { return p.shape.tokens * column_blocks; }
  int64_t blocks() const { return (teams() + kTeams - 1) / kTeams; }

  FFF_DEVICE void operator()(int64_t block) const {
    const int64_t team = block * kTeams + thread_index() / kTeamThreads;
    if (team >= teams()) {
      return;
    }
    Shared& shared = reinterpret_cast<Shared*>(shared_memory())[thread_index() / kTeamThreads];
    const int64_t token = team / column_blocks;
    const bool first_of_token = team % column_blocks == 0;
    for (int64_t tree = 0; tree < p.shape.trees; tree += kTrees) {
      const int64_t left = p.shape.trees - tree;
      const int trees = left < kTrees ? static_cast<int>(left) : kTrees;
      walk(token, tree, trees, team, first_of_token, shared);
    }
    if (p.output) {
      sync_team();
      score_leaves(token, team);
      sync_team();
      write_output(token, team);
    }
  }

 private:
  FFF_DEVICE static int team_thread() { return thread_index() % kTeamThreads; }
  FFF_DEVICE static int team_warp() { return team_thread() / kWarpSize; }
  FFF_DEVICE static void sync_team() {
    if constexpr (kTeams == 1) {
      sync_threads();
    } else {
      static_assert(kTeams == 1 || kWarps == 1);
      sync_warp();
    }
  }

  FFF_DEVICE int64_t gates_of_tree() const { return p.shape.levels + p.shape.leaf_width; }
  FFF_DEVICE A* gates_of(int64_t team, int64_t tree) const {
    return gates + (team * p.shape.trees + tree) * gates_of_tree();
  }
  FFF_DEVICE const T* x(int64_t token) const {
    return static_cast<const T*>(p.x) + token * p.shape.input_width;
  }
  FFF_DEVICE static bool aligned(const void* array, int64_t width) {
    return is_aligned(array, width * static_cast<int64_t>(sizeof(T)));
  }
  FFF_DEVICE static A element(const void* array, int64_t i) {
    return array ? static_cast<A>(static_cast<const T*>(array)[i]) : A(0);
  }

  // Trees `tree` ... `tree + trees - 1`.
  FFF_DEVICE void walk(int64_t token, int64_t tree, int trees, int64_t team, bool first_of_token,
                       Shared& shared) const {
    const TreeShape& s = p.shape;
    const int own = team_thread();
    if (own < trees) {
      shared.position[own] = first_level > 0 ? p.leaf[token * s.trees + tree + own] : 0;
    }
    sync_team();
    for (int level = first_level; level < s.levels; level += kLevels) {
      const int levels = s.levels - level < kLevels ? s.levels - level : kLevels;
      const int rows = trees * ((1 << levels) - 1);
      // Rows that are fewer than warps are cut.
      const int parts = rows < kWarps ? kWarps / rows : 1;
      for (int i = team_warp(); i < rows * parts; i += kWarps) {
        const A sum = score(token, tree, level, levels, i / parts, i % parts, parts, shared);
        if (lane_index() == 0) {
          shared.sums[i] = sum;
        }
      }
      sync_team();
      if (own < trees) {
        A* const to_gates = p.output ? gates_of(team, tree + own) : nullptr;
        shared.position[own] = decide(
            token * s.trees + tree + own, level, levels, shared.position[own],
            shared.sums + own * ((1 << levels) - 1) * parts, parts, first_of_token, to_gates);
      }
      sync_team();
    }
    if (own < trees) {
      const int64_t leaf = shared.position[own];
      if (first_of_token) {
        p.leaf[token * s.trees + tree + own] = leaf;
      }
      if (p.output) {
        reached[team * s.trees + tree + own] = leaf;
      }
    }
  }

  // Part of the dot product of row `row` of those that a step scores.
  FFF_DEVICE A score(int64_t token, int64_t first_tree, int level, int levels, int row, int part,
                     int parts, const Shared& shared) const {
    const TreeShape& s = p.shape;
    const int nodes = (1 << levels) - 1;
    const int tree = row / nodes;
    const int slot = row % nodes;
    const int below = highest_bit(static_cast<uint32_t>(slot) + 1);
    const int64_t node = (first_tree + tree) * s.nodes() + (int64_t(1) << (level + below)) - 1 +
                         (shared.position[tree] << below) + slot + 1 - (1 << below);
    const T* weight = static_cast<const T*>(p.weights.node_weight) + node * s.input_width;
    const int64_t chunks = (s.input_width + kPerChunk<T> - 1) / kPerChunk<T>;
    const int64_t begin = chunks * part / parts * kPerChunk<T>;
    const int64_t end =
        part + 1 < parts ? chunks * (part + 1) / parts * kPerChunk<T> : s.input_width;
    const bool chunked =
        aligned(p.x, s.input_width) && aligned(p.weights.node_weight, s.input_width);
    const A bias = part == 0 ? element(p.weights.node_bias, node) : A(0);
    return dot_of_warp(weight, x(token), begin, end, chunked) + bias;
  }

  // The position some levels further on; by one thread.
  FFF_DEVICE int64_t decide(int64_t pair, int level, int levels, int64_t position, const A* sums,
                            int parts, bool first_of_token, A* to_gates) const {
    const TreeShape& s = p.shape;
    int slot = 0;
    for (int end = level + levels; level < end; ++level) {
      A score = sums[slot * parts];
      for (int part = 1; part < parts; ++part) {
        score += sums[slot * parts + part];
      }
      const int64_t i = pair * s.levels + level;
      if (first_of_token) {
        static_cast<A*>(p.scores)[i] = score;
      }
      if (to_gates) {
        to_gates[level] = activate(p.node_activation, score);
      }
      if (level < s.decisions) {
        const int right = goes_right(p, score, i);
        slot = 2 * slot + 1 + right;
        position = 2 * position + right;
      }
    }
    return position;
  }

  FFF_DEVICE void score_leaves(int64_t token, int64_t team) const {
    const TreeShape& s = p.shape;
    const bool chunked = aligned(p.x, s.input_width) && aligned(p.weights.w1, s.input_width);
    for (int64_t i = team_warp(); i < s.trees * s.leaf_width; i += kWarps) {
      const int64_t tree = i / s.leaf_width;
      const int64_t j = i % s.leaf_width;
      const int64_t leaf = tree * s.leaves() + reached[team * s.trees + tree];
      const int64_t neuron = s.neuron_of_leaf(leaf, j);
      const T* weight = static_cast<const T*>(p.weights.w1) + neuron * s.input_width;
      const A sum =
          dot_of_warp(weight, x(token), 0, s.input_width, chunked) + element(p.weights.b1, neuron);
      if (lane_index() == 0) {
        const A scale =
            p.leaf_scale ? static_cast<const A*>(p.leaf_scale)[(token * s.trees) * s.leaf_width + i]
                         : A(1);
        gates_of(team, tree)[s.levels + j] = activate(p.leaf_activation, sum) * scale;
      }
    }
  }

  FFF_DEVICE void write_output(int64_t token, int64_t team) const {
    const TreeShape& s = p.shape;
    const int64_t width = s.output_width;
    const bool chunked = aligned(p.weights.node_output, width) && aligned(p.weights.w2, width) &&
                         aligned(p.weights.b2, width);
    const int64_t chunks = (width + kPerChunk<T> - 1) / kPerChunk<T>;
    const int64_t step = kTeamThreads * column_blocks;
    for (int64_t c = team % column_blocks * kTeamThreads + team_thread(); c < chunks; c += step) {
      const int64_t column = c * kPerChunk<T>;
      A sums[kPerChunk<T>] = {};
      const auto add = [&](A gate, const void* rows, int64_t row) {
        const auto e = Elements<T>::load(static_cast<const T*>(rows) + row * width + column,
                                         width - column, chunked);
        FFF_UNROLL
        for (int i = 0; i < kPerChunk<T>; ++i) {
          sums[i] += gate * static_cast<A>(e.values[i]);
        }
      };
      for (int64_t tree = 0; tree < s.trees; ++tree) {
        const A* gate = gates_of(team, tree);
        const int64_t leaf = reached[team * s.trees + tree];
        const int64_t leaf_of_all = tree * s.leaves() + leaf;
        FFF_UNROLL_BY(4)
        for (int level = first_level; p.weights.node_output && level < s.levels; ++level) {
          add(gate[level], p.weights.node_output, tree * s.nodes() + s.node_on_path(leaf, level));
        }
        FFF_UNROLL_BY(4)
        for (int64_t j = 0; j < s.leaf_width; ++j) {
          add(gate[s.levels + j], p.weights.w2, s.neuron_of_leaf(leaf_of_all, j));
        }
        if (p.weights.b2) {
          add(A(1), p.weights.b2, leaf_of_all);
        }
      }
      if (p.output_dtype == p.dtype) {
        write<T>(sums, token * width + column, width - column);
      } else {
        write<A>(sums, token * width + column, width - column);
      }
    }
  }

  template <typename O>
  FFF_DEVICE void write(const A (&sums)[kPerChunk<T>], int64_t at, int64_t count) const {
    O* const to = static_cast<O*>(p.output) + at;
    const bool aligned =
        is_aligned(p.output, p.shape.output_width * static_cast<int64_t>(sizeof(O)));
    store_sums(to, sums, count, aligned, adds);
  }
};

namespace pipeline {

// From `first_level` on, where `adds` says whether the output has what lies above. With first_level
// 0 a token may have up to `most_column_blocks` teams.
template <typename T, int kWarps, int kLevels, typename Queue>
void tree_forward_walk(const TreeForward& p, int first_level, bool adds, int64_t most_column_blocks,
                       Queue& queue) {
  using Walk = WalkToken<T, kWarps, kLevels>;
  const TreeShape& s = p.shape;
  const int64_t columns = int64_t(Walk::kTeamThreads) * kPerChunk<T>;
  const int64_t wanted = p.output ? (s.output_width + columns - 1) / columns : 1;
  // Several would race for the position to start from.
  const int64_t most = first_level > 0 ? 1 : std::max<int64_t>(most_column_blocks, 1);
  const int64_t column_blocks = std::clamp<int64_t>(wanted, 1, most);
  Walk walk = {p, first_level, adds, column_blocks, nullptr, nullptr};
  const int64_t pairs = p.output ? walk.teams() * s.trees : 0;
  walk.gates = queue.template array<acc_t<T>>(pairs * (s.levels + s.leaf_width));
  walk.reached = queue.template array<int64_t>(pairs);
  queue.launch(walk, walk.blocks(), Walk::kSharedBytes);
}

}  // namespace pipeline

}  // namespace fff::cuda
