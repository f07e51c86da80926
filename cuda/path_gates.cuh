// The gates of all neurons of a forest, of which those on the paths are not 0, from scores that
// were products of all of them; and back.
//
// A warp has 32 pairs of a token and a tree, whose neurons lie side by side. Each lane walks the
// path of one pair, then all write the neurons of all pairs in chunks.
#pragma once

#include "decision.h"
#include "rows.cuh"

namespace fff::cuda {

// Some values on the paths of a warp's pairs, in shared memory.
template <typename T, int kValues>
class WarpPaths {
 public:
  static constexpr int kWarps = 4;  // of a block
  static constexpr int kThreads = kWarps * kWarpSize;

  static int64_t blocks(const TreeShape& s) {
    return (s.tokens * s.trees + kThreads - 1) / kThreads;
  }
  static int64_t shared_bytes(const TreeShape& s) { return kWarps * floats(s) * sizeof(float); }

  FFF_DEVICE WarpPaths(const TreeShape& s, int64_t block)
      : s_(s),
        first_((block * kWarps + warp_index()) * kWarpSize),
        leaves_(reinterpret_cast<int*>(shared_memory()) + warp_index() * floats(s)),
        values_(reinterpret_cast<float*>(leaves_ + kWarpSize)) {}

  // This lane's pair, if it exists.
  FFF_DEVICE int64_t pair() const { return first_ + lane_index(); }
  FFF_DEVICE bool exists() const { return pair() < s_.tokens * s_.trees; }

  FFF_DEVICE void set_leaf(int64_t leaf) { leaves_[lane_index()] = static_cast<int>(leaf); }
  FFF_DEVICE void set(int which, int level, float to) { value(which, level, lane_index()) = to; }

  // The values of all nodes, 0 off the paths, each to an array [pairs, nodes] or, if that is null,
  // nowhere; called by the whole warp.
  FFF_DEVICE void write(void* const (&arrays)[kValues]) const {
    const int64_t left = s_.tokens * s_.trees - first_;
    const int nodes = static_cast<int>(s_.nodes());
    const int count = static_cast<int>(left < kWarpSize ? left : kWarpSize) * nodes;
    for (int c = lane_index() * kPerChunk<T>; c < count; c += kWarpSize * kPerChunk<T>) {
      int own = c / nodes, node = c % nodes;
      Elements<T> e[kValues];
      FFF_UNROLL
      for (int i = 0; i < kPerChunk<T>; ++i) {
        float values[kValues] = {};
        if (c + i < count) {
          const int level = highest_bit(static_cast<uint32_t>(node) + 1);
          const int position = node + 1 - (1 << level);
          if (leaves_[own] >> (s_.decisions - level) == position) {
            FFF_UNROLL
            for (int which = 0; which < kValues; ++which) {
              values[which] = value(which, level, own);
            }
          }
        }
        FFF_UNROLL
        for (int which = 0; which < kValues; ++which) {
          e[which].values[i] = static_cast<T>(values[which]);
        }
        if (++node == nodes) {
          node = 0;
          ++own;
        }
      }
      FFF_UNROLL
      for (int which = 0; which < kValues; ++which) {
        if (arrays[which]) {
          T* const to = static_cast<T*>(arrays[which]) + first_ * nodes + c;
          e[which].store(to, count - c, is_aligned(arrays[which], 0));
        }
      }
    }
  }

 private:
  FFF_DEVICE float& value(int which, int level, int lane) const {
    return values_[(which * s_.levels + level) * kWarpSize + lane];
  }
  FFF_HOST_DEVICE static int64_t floats(const TreeShape& s) {
    return (1 + kValues * s.levels) * kWarpSize;
  }

  const TreeShape& s_;
  int64_t first_;
  int* leaves_;
  float* values_;
};

// A pair's scores and decisions, from the scores of all nodes.
template <typename T>
class AllScores {
 public:
  FFF_DEVICE AllScores(const PathGates& p, int64_t pair)
      : f_(p.tree.forward),
        scores_(p.all_scores + pair * f_.shape.nodes()),
        bias_(p.bias ? static_cast<const T*>(p.bias) + pair % f_.shape.trees * f_.shape.nodes()
                     : nullptr),
        noise_(f_.noise ? static_cast<const float*>(f_.noise) + pair * f_.shape.levels : nullptr) {}

  FFF_DEVICE float operator[](int64_t node) const {
    return scores_[node] + (bias_ ? static_cast<float>(bias_[node]) : 0.0f);
  }

  // Below a node at `position` that decides.
  FFF_DEVICE int64_t next(int64_t position, int level, float score) const {
    const float z = noise_ ? score + noise_[level] : score;
    return 2 * position + (f_.tie_right ? z >= 0.0f : z > 0.0f);
  }

 private:
  const TreeForward& f_;
  const float* scores_;
  const T* bias_;
  const float* noise_;
};

template <typename T>
struct PathGatesForward {
  using Paths = WarpPaths<T, 1>;
  static constexpr int kThreads = Paths::kThreads;
  static constexpr int kBlocksPerProcessor = 1;
  PathGates p;

  FFF_DEVICE void operator()(int64_t block) const {
    const TreeForward& f = p.tree.forward;
    const TreeShape& s = f.shape;
    Paths paths(s, block);
    if (paths.exists()) {
      const int64_t pair = paths.pair();
      const AllScores<T> all(p, pair);
      int64_t position = 0;
      for (int level = 0; level < s.levels; ++level) {
        const float score = all[(int64_t(1) << level) - 1 + position];
        static_cast<float*>(f.scores)[pair * s.levels + level] = score;
        paths.set(0, level, activate(f.node_activation, score));
        if (level < s.decisions) {
          position = all.next(position, level, score);
        }
      }
      f.leaf[pair] = position;
      paths.set_leaf(position);
    }
    sync_warp();
    paths.write({p.gates});
  }
};

template <typename T>
struct PathGatesBackward {
  using Paths = WarpPaths<T, 2>;
  static constexpr int kThreads = Paths::kThreads;
  static constexpr int kBlocksPerProcessor = 1;
  PathGates p;

  FFF_DEVICE void operator()(int64_t block) const {
    const TreeShape& s = p.tree.forward.shape;
    Paths paths(s, block);
    if (paths.exists()) {
      const int64_t leaf = s.inside(p.tree.leaf[paths.pair()]);
      score_gradients(leaf, paths);
      paths.set_leaf(leaf);
    }
    sync_warp();
    paths.write({p.gates, p.grad_all_scores});
  }

 private:
  // From the leaf up, so that what the taken side of each decision contributes is at hand there.
  FFF_DEVICE void score_gradients(int64_t leaf, Paths& paths) const {
    const TreeBackward& t = p.tree;
    const TreeShape& s = t.forward.shape;
    const int64_t pair = paths.pair();
    const float* const along_all = p.grad_gates + pair * s.nodes();
    float taken = 0.0f;
    for (int level = s.levels - 1; level >= 0; --level) {
      const int64_t i = pair * s.levels + level;
      const float score = static_cast<const float*>(t.scores)[i];
      float grad = t.grad_scores ? static_cast<const float*>(t.grad_scores)[i] : 0.0f;
      const bool decides = t.straight_through && level < s.decisions;
      const float slope = decides ? decision_slope(t, score, i) : 0.0f;
      if (slope != 0.0f) {
        const float other = other_value(pair, leaf, level, along_all);
        grad += slope * (s.turns_right(leaf, level) ? taken - other : other - taken);
      }
      const float along = along_all[s.node_on_path(leaf, level)];
      const float gate = activate(t.forward.node_activation, score);
      grad += along * activation_slope(t.forward.node_activation, score);
      taken += gate * along;
      paths.set(0, level, gate);
      paths.set(1, level, grad);
    }
  }

  // <gradient of the output, contribution> of the child not taken at `level`, descended hard.
  FFF_DEVICE float other_value(int64_t pair, int64_t leaf, int level,
                               const float* along_all) const {
    const TreeForward& f = p.tree.forward;
    const AllScores<T> all(p, pair);
    int64_t position = (leaf >> (f.shape.decisions - 1 - level)) ^ 1;
    float value = 0.0f;
    for (++level; level < f.shape.levels; ++level) {
      const int64_t node = (int64_t(1) << level) - 1 + position;
      const float score = all[node];
      value += activate(f.node_activation, score) * along_all[node];
      position = all.next(position, level, score);  // beyond the last level nobody asks for it
    }
    return value;
  }
};

namespace pipeline {

template <typename Body, typename Queue>
void launch_path_gates(const PathGates& p, Queue& queue) {
  const TreeShape& s = p.tree.forward.shape;
  queue.launch(Body{p}, Body::Paths::blocks(s), Body::Paths::shared_bytes(s));
}

template <typename T, typename Queue>
void path_gates(const PathGates& p, Queue& queue) {
  launch_path_gates<PathGatesForward<T>>(p, queue);
}

template <typename T, typename Queue>
void path_gates_backward(const PathGates& p, Queue& queue) {
  launch_path_gates<PathGatesBackward<T>>(p, queue);
}

}  // namespace pipeline

}  // namespace fff::cuda
