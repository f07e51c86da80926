// Which of all neurons' activations a forest lets through: those on the paths. For forests so
// shallow that the scores of all nodes cost less than a walk; float32 only.
#pragma once

#include <ATen/Parallel.h>

#include "tree_walk.h"

namespace fff::cpu {
inline namespace CPU_CAPABILITY {

// Zeroes what is not on the path to `leaf`; row [nodes] of one tree.
inline void keep_path(const TreeShape& s, int64_t leaf, float* row) {
  uint64_t visited = 0;
  for (int level = 0; level < s.levels; ++level) {
    visited |= uint64_t(1) << s.node_on_path(leaf, level);
  }
  for (int64_t node = 0; node < s.nodes(); ++node) {
    row[node] = (visited >> node) & 1 ? row[node] : 0.0f;
  }
}

inline void path_gates(const PathGates& p) {
  const TreeForward& f = p.tree.forward;
  const TreeShape& s = f.shape;
  const int64_t neurons = s.trees * s.nodes();
  at::parallel_for(0, s.tokens, 1, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const float* all = p.all_scores + token * neurons;
      float* gates = static_cast<float*>(p.gates) + token * neurons;
      activate_all(f.node_activation, all, neurons, gates);
      float* scores = static_cast<float*>(f.scores) + token * s.trees * s.levels;
      int64_t* leaves = f.leaf + token * s.trees;
      if (s.levels == 1) {
        std::copy_n(all, neurons, scores);
        std::fill_n(leaves, s.trees, 0);
        continue;
      }
      for (int64_t tree = 0; tree < s.trees; ++tree) {
        int64_t position = 0;
        for (int level = 0; level < s.levels; ++level) {
          const float score = all[tree * s.nodes() + (int64_t(1) << level) - 1 + position];
          scores[tree * s.levels + level] = score;
          if (level < s.decisions) {
            position = 2 * position + goes_right(f, score, token, tree, level);
          }
        }
        leaves[tree] = position;
        keep_path(s, position, gates + tree * s.nodes());
      }
    }
  });
}

inline void path_gates_backward(const PathGates& p) {
  const TreeShape& s = p.tree.forward.shape;
  const float* path_scores = static_cast<const float*>(p.tree.scores);
  const float* grad_scores = static_cast<const float*>(p.tree.grad_scores);
  const int64_t neurons = s.trees * s.nodes();
  at::parallel_for(0, s.tokens, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> path(2 * s.trees * s.levels);
    float* gates = path.data();
    float* slopes = gates + s.trees * s.levels;
    for (int64_t token = begin; token < end; ++token) {
      const int64_t offset = token * s.trees * s.levels;
      activate_all(p.tree.forward.node_activation, path_scores + offset, s.trees * s.levels, gates,
                   slopes);
      float* all_gates = static_cast<float*>(p.gates) + token * neurons;
      float* grads = static_cast<float*>(p.grad_all_scores) + token * neurons;
      const float* grad_gates = p.grad_gates + token * neurons;
      std::fill_n(all_gates, neurons, 0.0f);
      std::fill_n(grads, neurons, 0.0f);
      for (int64_t tree = 0; tree < s.trees; ++tree) {
        const int64_t leaf = s.inside(p.tree.leaf[token * s.trees + tree]);
        for (int level = 0; level < s.levels; ++level) {
          const int64_t at = tree * s.levels + level;
          const int64_t node = tree * s.nodes() + s.node_on_path(leaf, level);
          all_gates[node] = gates[at];
          grads[node] =
              grad_gates[node] * slopes[at] + (grad_scores ? grad_scores[offset + at] : 0.0f);
        }
      }
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace fff::cpu
