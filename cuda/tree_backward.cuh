// Hard tree, backward: which way suits a call.
#pragma once

#include "tree_backward_slabs.cuh"
#include "tree_backward_walk.cuh"
#include "tree_forward.cuh"

namespace fff::cuda {

// The part of a call for some of its tokens.
template <typename T>
TreeBackward some_tokens(TreeBackward p, int64_t first, int64_t count) {
  const TreeShape& s = p.forward.shape;
  const auto in = [&](const void* array, int64_t bytes) -> const void* {
    return array ? static_cast<const char*>(array) + first * bytes : nullptr;
  };
  constexpr int64_t t = sizeof(T), a = sizeof(acc_t<T>);
  p.grad_output = in(p.grad_output, s.output_width * t);
  p.grad_scores = in(p.grad_scores, s.trees * s.levels * a);
  p.scores = in(p.scores, s.trees * s.levels * a);
  p.alternates = in(p.alternates, s.trees * s.levels * a);
  p.leaf += first * s.trees;
  if (p.grad_x) {
    const int64_t bytes = p.grad_x_dtype == p.forward.dtype ? t : a;
    p.grad_x = static_cast<char*>(p.grad_x) + first * s.input_width * bytes;
  }
  TreeForward& f = p.forward;
  f.x = in(f.x, s.input_width * t);
  f.noise = in(f.noise, s.trees * s.levels * a);
  f.leaf_scale = in(f.leaf_scale, s.trees * s.leaf_width * a);
  f.shape.tokens = count;
  return p;
}

// How many pairs of a token and a tree suit the workspace: 256 MiB of parts, unless these are few.
template <typename T>
int64_t pairs_at_once(const TreeShape& s) {
  constexpr int64_t kPartBytes = int64_t(1) << 28;
  constexpr int64_t kFewPairs = int64_t(1) << 14;
  const int64_t slots = std::max<int64_t>(s.leaf_width, 1 << kSlabLevels<T>);
  const int64_t elements = std::max<int64_t>(slots * std::max(s.input_width, s.output_width), 1);
  const int64_t parts = kPartBytes / static_cast<int64_t>(sizeof(float)) / elements;
  return std::max(parts / 2 * kRangeTokens, kFewPairs);
}

namespace pipeline {

// Products on the matrix units read all rows of a slab for as many tokens as there are; a walk
// reads the visited ones, but each row of the gradients looks through all tokens.
//
// At most `most_pairs` of a token and a tree at a time, so that the indices of their decisions are
// 32 bits wide.
template <typename T, typename Queue>
void tree_backward(const TreeBackward& p, Queue& queue, int64_t most_pairs = int64_t(1) << 20) {
  const TreeShape& s = p.forward.shape;
  if constexpr (!std::is_same_v<T, double>) {
    if (s.tokens > kTileTokens) {
      const int64_t at_once =
          std::max<int64_t>(std::min(most_pairs, pairs_at_once<T>(s)) / s.trees, 1);
      for (int64_t first = 0; first < s.tokens; first += at_once) {
        const int64_t count = std::min(at_once, s.tokens - first);
        queue.scope(
            [&] { tree_backward_slabs<T>(some_tokens<T>(p, first, count), first > 0, queue); });
      }
      return;
    }
  }
  tree_backward_walk<T>(p, queue);
}

}  // namespace pipeline

}  // namespace fff::cuda
