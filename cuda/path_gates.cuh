// The gates of all neurons of a forest, of which those on the paths are not 0, from scores that
// were products of all of them; and back.
//
// A warp has 32 pairs of a token and a tree, whose neurons lie side by side. Each lane walks the
// path of one pair, then all write the neurons of all pairs in chunks.
#pragma once

#include "backward_gates.cuh"
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

// A pair's scores of all nodes.
template <typename T>
class AllScores {
 public:
  FFF_DEVICE AllScores(const PathGates& p, int64_t pair) {
    const TreeShape& s = p.tree.forward.shape;
    scores_ = p.all_scores + pair * s.nodes();
    bias_ = p.bias ? static_cast<const T*>(p.bias) + pair % s.trees * s.nodes() : nullptr;
  }

  FFF_DEVICE float operator[](int64_t node) const {
    return scores_[node] + (bias_ ? static_cast<float>(bias_[node]) : 0.0f);
  }

 private:
  const float* scores_;
  const T* bias_;
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
        const int64_t i = pair * s.levels + level;
        static_cast<float*>(f.scores)[i] = score;
        paths.set(0, level, activate(f.node_activation, score));
        if (level < s.decisions) {
          position = 2 * position + goes_right(f, score, i);
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
      const int64_t pair = paths.pair();
      const int64_t leaf = s.inside(p.tree.leaf[pair]);
      const AllScores<T> all(p, pair);
      const float* const alongs = p.grad_gates + pair * s.nodes();
      const auto along = [&](int64_t node) { return alongs[node]; };
      score_gradients(
          p.tree, pair, leaf, 0.0f, [&](int level) { return along(s.node_on_path(leaf, level)); },
          [&](int level) {
            const auto score = [&](int64_t node) { return all[node]; };
            return follow_other<float>(p.tree.forward, pair, leaf, level, score, along).value;
          },
          [&](int level, float gate, float grad) {
            paths.set(0, level, gate);
            paths.set(1, level, grad);
          });
      paths.set_leaf(leaf);
    }
    sync_warp();
    paths.write({p.gates, p.grad_all_scores});
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
