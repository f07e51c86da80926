// Hard tree, backward, of many tokens: products on the matrix units over the slabs of the forward
// pass (tree_slabs.cuh). The paths are known, so that tokens are grouped for all slabs at first.
//   1. <gradient of the output, output row> of the nodes of each slab; what leaf networks make of
//   it
//   2. for straight-through gradients, what the branches not taken contribute: each descends its
//      slab together with its token, whose tile has the scores of all nodes of the slab, and goes
//      on as a walker of its own, with those that enter the next slab by the same node
//   3. per token, from the leaf up, the gradients of scores
//   4. the gradient of x: an output of the forward pass, with score gradients as gates and the
//      nodes' weights as output rows
//   5. the gradients of weights (row_gradients.cuh)
//
// docs/cuda.md has the figures.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "backward_gates.cuh"
#include "row_gradients.cuh"
#include "walkers.cuh"

namespace fff::cuda {

// What steps 1 and 2 leave for step 3, and step 3 for the others.
template <typename T>
using SlabGates = BackwardGates<float, T>;

// Dot products of the vectors of a tile's walkers with some rows of weights.
template <typename T, int kColumns>
struct TileDots {
  using Dots = DotTile<T, kColumns>;
  using Sums = WarpTile<T, kColumns>;
  static constexpr int kPitch = Dots::kPitch;
  static constexpr int64_t kSharedBytes = Dots::kSharedBytes;
  static constexpr int kResults = kTileTokens * kPitch;  // floats; two of them fit
  static_assert(2 * kResults * sizeof(float) <= kSharedBytes);
  const Grouping& grouping;
  const Walkers& walkers;
  const Tile& tile;
  bool whole_floats;  // or rounded to tf32

  // row_at(column): index of the row, or -1.
  template <typename RowAt>
  FFF_DEVICE Sums run(unsigned char* shared, const void* vectors, const void* rows, int64_t width,
                      const RowAt& row_at) const {
    const StagedRows<T, kTileRows> a(
        [&](int row) {
          const bool present = row < tile.count;
          const int64_t token = present ? walkers.token(grouping.token(tile, row)) : 0;
          return row_or_null<T>(vectors, token, width, present);
        },
        vectors, width);
    const StagedRows<T, kColumns> b(
        [&](int column) {
          const int64_t row = row_at(column);
          return row_or_null<T>(rows, row, width, row >= 0);
        },
        rows, width);
    return Dots::sums(shared, a, b, width, whole_floats);
  }
};

// Step 1 for the nodes of a slab, on a tile of paths, or step 2, on one of alternates that enter
// it.
template <typename T>
struct BackwardSlab {
  static constexpr int kThreads = kTileThreads;
  static constexpr int kBlocksPerProcessor = 2;
  static constexpr int kSlots = 1 << kSlabLevels<T>;
  using Dots = TileDots<T, kSlots>;
  static constexpr int64_t kSharedBytes =
      Dots::kSharedBytes + kSlots * static_cast<int64_t>(sizeof(float));
  TreeBackward p;
  SlabGates<T> gates;
  Grouping grouping;  // by the topmost nodes
  Walkers walkers;
  bool paths;
  int levels;  // of the slab

  int64_t blocks() const { return grouping.tiles(); }

  FFF_DEVICE void operator()(int64_t block) const {
    const Tile tile = grouping.tile(block);
    if (tile.count == 0) {
      return;
    }
    const TreeForward& f = p.forward;
    const TreeShape& s = f.shape;
    const int64_t tree = grouping.tree(tile.group);
    const SlabNodes nodes = {s, tree, grouping.position(tile.group), grouping.level, levels};
    unsigned char* const shared = shared_memory();
    float* const biases = reinterpret_cast<float*>(shared + Dots::kSharedBytes);
    const Dots dots = {grouping, walkers, tile, !f.allow_tf32};
    const auto row_at = [&](int slot) { return slot < nodes.count() ? nodes.row(slot) : -1; };
    typename Dots::Sums along_sums, score_sums;
    if (f.weights.node_output) {
      along_sums = dots.run(shared, p.grad_output, f.weights.node_output, s.output_width, row_at);
    }
    if (p.straight_through) {
      if (thread_index() < kSlots) {
        const int64_t row = f.weights.node_bias ? row_at(thread_index()) : -1;
        biases[thread_index()] =
            row < 0 ? 0.0f : static_cast<float>(static_cast<const T*>(f.weights.node_bias)[row]);
      }
      score_sums = dots.run(shared, f.x, f.weights.node_weight, s.input_width, row_at);
    }
    float* const alongs = reinterpret_cast<float*>(shared);
    float* const scores = alongs + Dots::kResults;
    along_sums.store(alongs, Dots::kPitch);
    score_sums.store(scores, Dots::kPitch);
    sync_threads();

    // Two threads have one walker.
    const int row = thread_index() % kTileTokens;
    if (row >= tile.count) {
      return;
    }
    const int64_t walker = grouping.token(tile, row);
    const Values values = {f,
                           nodes,
                           walkers.pair(walker, tree),
                           f.weights.node_output ? alongs + row * Dots::kPitch : nullptr,
                           scores + row * Dots::kPitch,
                           biases};
    if (paths) {
      for (int below = thread_index() / kTileTokens; below < levels; below += 2) {
        along_path(values, below);
      }
    } else if (thread_index() < kTileTokens) {
      follow(values, 0, 0, walkers.index(walker, tree), gates.other[walkers.index(walker, tree)]);
    }
  }

 private:
  // Of one walker.
  struct Values {
    const TreeForward& f;
    const SlabNodes& nodes;
    int64_t pair;
    const float* alongs;  // by slot; null without output rows
    const float* scores;  // without biases
    const float* biases;
  };

  FFF_DEVICE void along_path(const Values& v, int below) const {
    const TreeShape& s = p.forward.shape;
    const int level = grouping.level + below;
    const int64_t leaf = gates.leaf[v.pair];
    const int first = (1 << below) - 1;  // slot of the level
    const int slot = first + (static_cast<int>(leaf >> (s.decisions - level)) & first);
    const int64_t i = v.pair * s.levels + level;
    if (v.alongs) {
      gates.along[i] = v.alongs[slot];
    }
    if (!p.straight_through || level >= s.decisions) {
      return;
    }
    const int64_t other = v.pair * s.decisions + level;
    if (decision_slope(p, static_cast<const float*>(p.scores)[i], i) == 0.0f) {
      gates.other[other] = 0.0f;
      gates.other_position[other] = -1;
    } else {
      follow(v, below + 1, 2 * slot + 1 + !s.turns_right(leaf, level), other, 0.0f);
    }
  }

  // From a node of the slab, or right below it, down to where the slab ends.
  FFF_DEVICE void follow(const Values& v, int below, int slot, int64_t other, float value) const {
    const TreeForward& f = v.f;
    const TreeShape& s = f.shape;
    for (; below < levels; ++below) {
      const int level = grouping.level + below;
      const float score = v.scores[slot] + v.biases[slot];
      if (v.alongs) {
        value += activate(f.node_activation, score) * v.alongs[slot];
      }
      if (level < s.decisions) {
        slot = 2 * slot + 1 + goes_right(f, score, v.pair * s.levels + level);
      }
    }
    gates.other[other] = value;
    gates.other_position[other] =
        grouping.level + levels > s.decisions
            ? -1  // there is nothing below
            : (v.nodes.position << levels) + slot + 1 - (int64_t(1) << levels);
  }
};

// The same steps for leaf networks; a block has a tile of walkers to the same few leaves.
template <typename T>
struct BackwardLeaves {
  static constexpr int kThreads = kTileThreads;
  static constexpr int kBlocksPerProcessor = sizeof(T) == 2 ? 2 : 1;
  using Dots = TileDots<T, kLeafColumns>;
  static constexpr int64_t kSharedBytes = Dots::kSharedBytes;
  TreeBackward p;
  SlabGates<T> gates;
  Grouping grouping;
  Walkers walkers;
  bool paths;
  int unit;  // log2 of the leaves of a group

  FFF_DEVICE void operator()(int64_t block) const {
    const Tile tile = grouping.tile(block);
    if (tile.count == 0) {
      return;
    }
    const TreeForward& f = p.forward;
    const TreeShape& s = f.shape;
    unsigned char* const shared = shared_memory();
    float* const alongs = reinterpret_cast<float*>(shared);
    float* const pres = alongs + Dots::kResults;
    const Dots dots = {grouping, walkers, tile, !f.allow_tf32};

    // Two threads have one walker.
    const int row = thread_index() % kTileTokens;
    const int half = thread_index() / kTileTokens;
    float value = 0.0f;

    const int64_t neurons = s.leaf_width << unit;
    for (int64_t first = 0; first < neurons; first += kLeafColumns) {
      const auto row_at = [&](int column) {
        return first + column < neurons ? tile.group * neurons + first + column : -1;
      };
      const auto along_sums = dots.run(shared, p.grad_output, f.weights.w2, s.output_width, row_at);
      const auto pre_sums = dots.run(shared, f.x, f.weights.w1, s.input_width, row_at);
      along_sums.store(alongs, Dots::kPitch);
      pre_sums.store(pres, Dots::kPitch);
      sync_threads();
      const Own own = own_walker(tile, row);
      const int64_t begin = own.leaf * s.leaf_width, end = begin + s.leaf_width;
      const int64_t last = first + kLeafColumns < end ? first + kLeafColumns : end;
      for (int64_t neuron = (begin > first ? begin : first) + half; own.exists && neuron < last;
           neuron += 2) {
        const int64_t i = row * Dots::kPitch + neuron - first;
        value +=
            hidden(own.pair, neuron - begin, tile.group * neurons + neuron, pres[i], alongs[i]);
      }
      sync_threads();  // the results were read
    }

    if (!p.straight_through) {
      return;
    }
    const Own own = own_walker(tile, row);
    if (f.weights.b2) {
      const auto row_at = [&](int column) {
        return column < 1 << unit ? (tile.group << unit) + column : -1;
      };
      dots.run(shared, p.grad_output, f.weights.b2, s.output_width, row_at)
          .store(alongs, Dots::kPitch);
      sync_threads();
      value += half == 0 && own.exists ? alongs[row * Dots::kPitch + own.leaf] : 0.0f;
    }
    if (half == 1) {
      pres[row] = value;
    }
    sync_threads();
    if (half == 0 && own.exists) {
      value += pres[row];
      if (paths) {
        gates.leaf_value[own.pair] = value;
      } else {
        gates.other[own.index] += value;
      }
    }
  }

 private:
  struct Own {
    bool exists;  // and goes to a leaf
    int64_t index;
    int64_t pair;
    int64_t leaf;  // among the group's
  };

  // Asked for anew wherever it is wanted, for products want the registers in between.
  FFF_DEVICE Own own_walker(const Tile& tile, int row) const {
    if (row >= tile.count) {
      return {};
    }
    const int64_t walker = grouping.token(tile, row);
    const int64_t tree = grouping.tree(tile.group);
    const int64_t index = walkers.index(walker, tree);
    const int64_t position = walkers.positions[index];
    return {position >= 0, index, walkers.pair(walker, tree),
            position & ((int64_t(1) << unit) - 1)};
  }

  // What the neuron adds to <gradient of the output, output>.
  FFF_DEVICE float hidden(int64_t pair, int64_t j, int64_t neuron, float pre, float along) const {
    const TreeForward& f = p.forward;
    if (f.weights.b1) {
      pre += static_cast<float>(static_cast<const T*>(f.weights.b1)[neuron]);
    }
    const int64_t i = pair * f.shape.leaf_width + j;
    const float scale = f.leaf_scale ? static_cast<const float*>(f.leaf_scale)[i] : 1.0f;
    const float value = activate(f.leaf_activation, pre) * scale;
    if (paths) {
      gates.hidden[i] = static_cast<T>(value);
      gates.grad_hidden[i] =
          static_cast<T>(along * scale * activation_slope(f.leaf_activation, pre));
    }
    return value * along;
  }
};

namespace pipeline {

// The branches not taken, from where the paths' slabs left them.
template <typename T, typename Queue>
void follow_alternates(const TreeBackward& p, const Slabs& slabs, const SlabGates<T>& gates,
                       Queue& queue) {
  const TreeShape& s = p.forward.shape;
  const auto grouped = [&](int level, int positions_level, int count, const auto& launch) {
    queue.scope([&] {
      const Walkers walkers = {s.trees, count, s.decisions, gates.other_position, false};
      const Grouping all = {s.tokens * count, s.trees, 0, nullptr, nullptr};
      launch(group_walkers(all, walkers, positions_level, level, kSlabLevels<T>, queue), walkers);
    });
  };
  for (int slab = 1; slab < slabs.count; ++slab) {
    const int level = slabs.begin(slab);
    grouped(level, level, level, [&](const Grouping& grouping, const Walkers& walkers) {
      const BackwardSlab<T> body = {p, gates, grouping, walkers, false, slabs.size(slab)};
      launch_side_by_side(std::vector{body}, queue);
    });
  }
  if (s.leaf_width > 0 && s.decisions > 0) {
    grouped(slabs.last_level, s.decisions, s.decisions,
            [&](const Grouping& grouping, const Walkers& walkers) {
              using Leaves = BackwardLeaves<T>;
              queue.launch(Leaves{p, gates, grouping, walkers, false, slabs.unit}, grouping.tiles(),
                           Leaves::kSharedBytes);
            });
  }
}

// T: a float type of the matrix units; float is rounded to tf32 where that is allowed.
// `adds`: to the gradients of weights that are there.
template <typename T, typename Queue>
void tree_backward_slabs(const TreeBackward& p, bool adds, Queue& queue) {
  const TreeForward& f = p.forward;
  const TreeShape& s = f.shape;
  const int most_levels = kSlabLevels<T>;
  const Slabs slabs(s, most_levels, std::numeric_limits<int>::max());
  const SlabGates<T> gates(p, s.leaf_width > 0 ? 1 : 0, true, queue);
  const int64_t pairs = s.tokens * s.trees;
  for_each_thread(CopyLeaves{s, p.leaf, gates.leaf}, pairs, queue);
  const Walkers paths = {s.trees, 1, 1, gates.leaf, true};

  // Of each slab, and of the leaf networks.
  std::vector<Grouping> groupings = {{s.tokens, s.trees, 0, nullptr, nullptr}};
  for (int slab = 1; slab <= slabs.count; ++slab) {
    const int level = slab < slabs.count ? slabs.begin(slab) : slabs.last_level;
    groupings.push_back(
        group_walkers(groupings.back(), paths, s.decisions, level, most_levels, queue));
  }
  const Grouping& last = groupings.back();

  const bool score_gradients = s.levels > 0 && p.scores_have_gradients();
  if (s.levels > 0 && (f.weights.node_output || p.straight_through)) {
    std::vector<BackwardSlab<T>> bodies;
    for (int slab = 0; slab < slabs.count; ++slab) {
      bodies.push_back({p, gates, groupings[slab], paths, true, slabs.size(slab)});
    }
    launch_side_by_side(bodies, queue);
  }
  if (s.leaf_width > 0) {
    using Leaves = BackwardLeaves<T>;
    queue.launch(Leaves{p, gates, last, paths, true, slabs.unit}, last.tiles(),
                 Leaves::kSharedBytes);
  }
  if (p.straight_through) {
    follow_alternates(p, slabs, gates, queue);
  }
  if (score_gradients) {
    for_each_thread(ScoreGradients<float, T>{p, gates}, pairs, queue);
  }

  if (p.grad_x) {
    TreeForward x = f;
    x.shape.output_width = s.input_width;
    x.node_activation = Activation::kIdentity;
    x.weights = {};
    x.weights.node_output = score_gradients ? f.weights.node_weight : nullptr;
    x.weights.w2 = f.weights.w1;
    x.scores = gates.score;
    x.leaf = gates.leaf;
    x.output = p.grad_x;
    x.output_dtype = p.grad_x_dtype;
    tree_output_slabs<T, 1 << kSlabLevels<T>>(x, last, slabs, gates.grad_hidden, queue);
  }

  const auto rows = [&]<template <typename> typename Gates>(const Gates<T>& row_gates,
                                                            const void* vectors, int64_t width,
                                                            void* gradient, void* bias) {
    return RowGradients<T, Gates>{row_gates,
                                  static_cast<const T*>(vectors),
                                  width,
                                  !f.allow_tf32,
                                  gradient,
                                  bias,
                                  p.grad_weights_dtype,
                                  adds,
                                  {}};
  };
  const void* const g = p.grad_output;
  std::vector<RowGradients<T, NodeGates>> of_nodes;
  for (int slab = 0; score_gradients && slab < slabs.count; ++slab) {
    const auto gates_of = [&](const float* values) {
      return NodeGates<T>{s, groupings[slab], slabs.size(slab), gates.leaf, values};
    };
    of_nodes.push_back(
        rows(gates_of(gates.score), f.x, s.input_width, p.grad_node_weight, p.grad_node_bias));
    of_nodes.push_back(
        rows(gates_of(gates.node_gate), g, s.output_width, p.grad_node_output, nullptr));
  }
  row_gradients(of_nodes, queue);
  const auto gates_of = [&](const T* values, int64_t width) {
    return LeafGates<T>{s, last, slabs.unit, gates.leaf, values, width};
  };
  row_gradients(
      std::vector<RowGradients<T, LeafGates>>{
          rows(gates_of(gates.grad_hidden, s.leaf_width), f.x, s.input_width, p.grad_w1, p.grad_b1),
          rows(gates_of(gates.hidden, s.leaf_width), g, s.output_width, p.grad_w2, nullptr),
          rows(gates_of(nullptr, 1), g, s.output_width, p.grad_b2, nullptr)},
      queue);
}

}  // namespace pipeline

}  // namespace fff::cuda
