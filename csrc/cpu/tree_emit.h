// What a token puts out where its walk ends: its path's gated rows, summed and written once.
#pragma once

#include "leaf_network.h"

namespace fff::cpu {
inline namespace CPU_CAPABILITY {

template <typename T>
class Emitter {
  using A = acc_t<T>;

 public:
  explicit Emitter(const TreeForward& p)
      : p_(p),
        rows_(p.shape.levels + p.shape.leaf_width + 1),
        coefficients_(rows_.size() * kTokenTile),
        hidden_(p.shape.leaf_width * kTokenTile) {}

  // Writes for `tree` from here on.
  void enter(int64_t tree) {
    tree_ = Tree<T>(p_.shape, p_.weights, tree);
    tree_index_ = tree;
  }

  void operator()(int64_t leaf, const int64_t* tokens, int64_t count) {
    const TreeShape& s = p_.shape;
    for (int64_t i = 0; i < count; ++i) {
      p_.leaf[tokens[i] * s.trees + tree_index_] = leaf;
    }
    if (p_.output == nullptr) {
      return;
    }
    int64_t row_count = 0;
    if (tree_.node_output) {
      for (int level = 0; level < s.levels; ++level) {
        rows_[row_count++] = tree_.node_output + s.node_on_path(leaf, level) * s.output_width;
      }
    }
    for (int64_t j = 0; j < s.leaf_width; ++j) {
      rows_[row_count++] = tree_.w2 + s.neuron_of_leaf(leaf, j) * s.output_width;
    }
    if (tree_.b2) {
      rows_[row_count++] = tree_.b2 + leaf * s.output_width;
    }
    for (int64_t i = 0; i < count; i += kTokenTile) {
      const int n = static_cast<int>(std::min<int64_t>(kTokenTile, count - i));
      gates(leaf, tokens + i, n, row_count);
      if (p_.output_dtype == p_.dtype) {
        write(static_cast<T*>(p_.output), tokens + i, n, row_count);
      } else {
        write(static_cast<A*>(p_.output), tokens + i, n, row_count);
      }
    }
  }

 private:
  void gates(int64_t leaf, const int64_t* tokens, int n, int64_t row_count) {
    const TreeShape& s = p_.shape;
    const A* scores = static_cast<const A*>(p_.scores);
    int64_t column = 0;
    if (tree_.node_output) {
      for (int t = 0; t < n; ++t) {
        const A* path = scores + (tokens[t] * s.trees + tree_index_) * s.levels;
        A* gate = coefficients_.data() + t * row_count;
        activate_all(p_.node_activation, path, s.levels, gate);
      }
      column = s.levels;
    }
    if (s.leaf_width > 0) {
      auto* hidden = reinterpret_cast<A(*)[kTokenTile]>(hidden_.data());
      leaf_pre_activations(tree_, s, leaf, static_cast<const T*>(p_.x), tokens, n, hidden);
      activate_all(p_.leaf_activation, hidden[0], s.leaf_width * kTokenTile, hidden[0]);
      for (int t = 0; t < n; ++t) {
        A* gate = coefficients_.data() + t * row_count + column;
        const A* scale = leaf_scale_of<A>(p_, tokens[t], tree_index_);
        for (int64_t j = 0; j < s.leaf_width; ++j) {
          gate[j] = hidden[j][t] * (scale ? scale[j] : A(1));
        }
      }
      column += s.leaf_width;
    }
    if (tree_.b2) {
      for (int t = 0; t < n; ++t) {
        coefficients_[t * row_count + column] = A(1);
      }
    }
  }

  template <typename O>
  void write(O* output, const int64_t* tokens, int n, int64_t row_count) {
    const int64_t width = p_.shape.output_width;
    O* ys[kTokenTile];
    for (int t = 0; t < n; ++t) {
      ys[t] = output + tokens[t] * width;
    }
    combine(rows_.data(), coefficients_.data(), row_count, row_count, ys, n, width,
            write_mode(output, p_.shape, width, tree_index_));
  }

  const TreeForward& p_;
  Tree<T> tree_;
  int64_t tree_index_ = 0;
  std::vector<const T*> rows_;
  std::vector<A> coefficients_;  // [kTokenTile, rows]
  std::vector<A> hidden_;        // [leaf_width, kTokenTile]
};

}  // namespace CPU_CAPABILITY
}  // namespace fff::cpu
