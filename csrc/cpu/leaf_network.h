// The hidden layer of one leaf for a tile of tokens.
#pragma once

#include "tree_walk.h"

namespace fff::cpu {
inline namespace CPU_CAPABILITY {

// out[j - begin][t] = <rows of the leaf [j], vectors[tokens[t]]> for n <= kTokenTile tokens and
// neurons j in [begin, end).
template <typename T>
inline void leaf_dots(const T* rows, const TreeShape& s, int64_t leaf, int64_t begin, int64_t end,
                      const T* vectors, const int64_t* tokens, int n, int64_t width,
                      acc_t<T> (*out)[kTokenTile]) {
  const T* xs[kTokenTile];
  for (int t = 0; t < n; ++t) {
    xs[t] = vectors + tokens[t] * width;
  }
  for (int64_t j = begin; j < end; j += 3) {
    const T* row[3];
    const int64_t count = std::min<int64_t>(3, end - j);
    for (int64_t r = 0; r < count; ++r) {
      row[r] = rows + s.neuron_of_leaf(leaf, j + r) * width;
    }
    dots_rows(row, count, xs, n, width, out + (j - begin));
  }
}

// As above, for all neurons of the leaf.
template <typename T>
inline void leaf_dots(const T* rows, const TreeShape& s, int64_t leaf, const T* vectors,
                      const int64_t* tokens, int n, int64_t width, acc_t<T> (*out)[kTokenTile]) {
  leaf_dots(rows, s, leaf, 0, s.leaf_width, vectors, tokens, n, width, out);
}

// pre[j - begin][t] = <w1[leaf, j], x[tokens[t]]> + b1[leaf, j] for neurons j in [begin, end)
template <typename T>
inline void leaf_pre_activations(const Tree<T>& tree, const TreeShape& s, int64_t leaf,
                                 int64_t begin, int64_t end, const T* x, const int64_t* tokens,
                                 int n, acc_t<T> (*pre)[kTokenTile]) {
  leaf_dots(tree.w1, s, leaf, begin, end, x, tokens, n, s.input_width, pre);
  if (tree.b1) {
    for (int64_t j = begin; j < end; ++j) {
      const acc_t<T> bias = static_cast<acc_t<T>>(tree.b1[s.neuron_of_leaf(leaf, j)]);
      for (int t = 0; t < n; ++t) {
        pre[j - begin][t] += bias;
      }
    }
  }
}

template <typename T>
inline void leaf_pre_activations(const Tree<T>& tree, const TreeShape& s, int64_t leaf, const T* x,
                                 const int64_t* tokens, int n, acc_t<T> (*pre)[kTokenTile]) {
  leaf_pre_activations(tree, s, leaf, 0, s.leaf_width, x, tokens, n, pre);
}

// out[t] = <b2[leaf], grad_output[tokens[t]]>
template <typename T>
inline void leaf_bias_dots(const Tree<T>& tree, const TreeShape& s, int64_t leaf,
                           const T* grad_output, const int64_t* tokens, int n, acc_t<T>* out) {
  if (!tree.b2) {
    std::fill_n(out, n, acc_t<T>(0));
    return;
  }
  const T* gs[kTokenTile];
  for (int t = 0; t < n; ++t) {
    gs[t] = grad_output + tokens[t] * s.output_width;
  }
  const T* row = tree.b2 + leaf * s.output_width;
  acc_t<T> dot[1][kTokenTile];
  dots<1>(&row, gs, n, s.output_width, dot);
  std::copy_n(dot[0], n, out);
}

// The factors of one token's hidden activations, or null.
template <typename A>
inline const A* leaf_scale_of(const TreeForward& p, int64_t token, int64_t tree) {
  const A* scale = static_cast<const A*>(p.leaf_scale);
  return scale ? scale + (token * p.shape.trees + tree) * p.shape.leaf_width : nullptr;
}

}  // namespace CPU_CAPABILITY
}  // namespace fff::cpu
