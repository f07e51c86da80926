// Hard tree, backward: which way suits a call.
#pragma once

#include <algorithm>
#include <array>

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

// How many pairs of a token and a tree suit the workspace, unless these are few.
template <typename T>
int64_t pairs_at_once(const TreeShape& s) {
  constexpr int64_t kFewPairs = int64_t(1) << 14;
  const int64_t slots = std::max<int64_t>(s.leaf_width, 1 << kSlabLevels<T>);
  const int64_t elements = std::max<int64_t>(slots * std::max(s.input_width, s.output_width), 1);
  return std::max(kPartElements / elements / 2 * kRangeTokens, kFewPairs);
}

// A weight's gradient, and how many elements it has.
struct WeightGradient {
  void* TreeBackward::* array;
  int64_t elements;
};

inline std::array<WeightGradient, 7> weight_gradients(const TreeShape& s) {
  const int64_t nodes = s.trees * s.nodes(), leaves = s.trees * s.leaves();
  const int64_t neurons = leaves * s.leaf_width;
  return {{{&TreeBackward::grad_node_weight, nodes * s.input_width},
           {&TreeBackward::grad_node_bias, nodes},
           {&TreeBackward::grad_node_output, nodes * s.output_width},
           {&TreeBackward::grad_w1, neurons * s.input_width},
           {&TreeBackward::grad_b1, neurons},
           {&TreeBackward::grad_w2, neurons * s.output_width},
           {&TreeBackward::grad_b2, leaves * s.output_width}}};
}

// Item: an element of a gradient that was summed in the accumulation type.
template <typename T>
struct RoundSum {
  const acc_t<T>* from;
  T* to;

  FFF_DEVICE void operator()(int64_t i, bool exists) const {
    if (exists) {
      to[i] = static_cast<T>(from[i]);
    }
  }
};

namespace pipeline {

// `at_once` tokens at a time, whose gradients of weights are summed in the accumulation type.
template <typename T, typename Queue>
void tree_backward_in_pieces(const TreeBackward& p, int64_t at_once, Queue& queue) {
  using A = acc_t<T>;
  const TreeShape& s = p.forward.shape;
  constexpr bool kRounds = !std::is_same_v<T, A>;  // what is summed, to p's gradients
  TreeBackward sums = p;
  if constexpr (kRounds) {
    sums.grad_weights_dtype = kDType<A>;
    for (const auto& [array, elements] : weight_gradients(s)) {
      sums.*array = p.*array ? queue.template array<A>(elements) : nullptr;
    }
  }
  for (int64_t first = 0; first < s.tokens; first += at_once) {
    const int64_t count = std::min(at_once, s.tokens - first);
    queue.scope(
        [&] { tree_backward_slabs<T>(some_tokens<T>(sums, first, count), first > 0, queue); });
  }
  if constexpr (kRounds) {
    for (const auto& [array, elements] : weight_gradients(s)) {
      const RoundSum<T> body = {static_cast<const A*>(sums.*array), static_cast<T*>(p.*array)};
      for_each_thread(body, p.*array ? elements : 0, queue);
    }
  }
}

// Products on the matrix units read all rows of a slab for as many tokens as there are; a walk
// reads the visited ones, but each row of the gradients looks through all tokens.
//
// At most `most_pairs` of a token and a tree at a time, so that the indices of their decisions are
// 32 bits wide.
template <typename T, typename Queue>
void tree_backward(TreeBackward p, Queue& queue, int64_t most_pairs = int64_t(1) << 20) {
  const TreeShape& s = p.forward.shape;
  if (!p.scores_have_gradients()) {
    p.grad_node_weight = p.grad_node_bias = nullptr;
  }
  if constexpr (!std::is_same_v<T, double>) {
    if (s.tokens > kTileTokens) {
      const int64_t at_once =
          std::max<int64_t>(std::min(most_pairs, pairs_at_once<T>(s)) / s.trees, 1);
      if (at_once < s.tokens) {
        tree_backward_in_pieces<T>(p, at_once, queue);
      } else {
        tree_backward_slabs<T>(p, false, queue);
      }
      return;
    }
  }
  tree_backward_walk<T>(p, queue);
}

}  // namespace pipeline

}  // namespace fff::cuda
