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
        coefficients_(rows_.size() * kGroup),
        hidden_(kRowBlock * kTokenTile) {}

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
    for (int64_t i = 0; i < count; i += kGroup) {
      const int64_t n = std::min(kGroup, count - i);
      gates(leaf, tokens + i, n, row_count);
      if (p_.output_dtype == p_.dtype) {
        write(static_cast<T*>(p_.output), tokens + i, n, row_count);
      } else {
        write(static_cast<A*>(p_.output), tokens + i, n, row_count);
      }
    }
  }

 private:
  // Fills the coefficients of n <= kGroup tokens.
  void gates(int64_t leaf, const int64_t* tokens, int64_t n, int64_t row_count) {
    const TreeShape& s = p_.shape;
    const A* scores = static_cast<const A*>(p_.scores);
    int64_t column = 0;
    if (tree_.node_output) {
      for (int64_t t = 0; t < n; ++t) {
        const A* path = scores + (tokens[t] * s.trees + tree_index_) * s.levels;
        activate_all(p_.node_activation, path, s.levels, coefficients_.data() + t * row_count);
      }
      column = s.levels;
    }
    for (int64_t j = 0; j < s.leaf_width; j += kRowBlock) {
      const int64_t end = std::min(j + kRowBlock, s.leaf_width);
      for (int64_t t = 0; t < n; t += kTokenTile) {
        hidden_gates(leaf, j, end, tokens + t, std::min<int64_t>(kTokenTile, n - t),
                     coefficients_.data() + t * row_count + column, row_count);
      }
    }
    column += s.leaf_width;
    if (tree_.b2) {
      for (int64_t t = 0; t < n; ++t) {
        coefficients_[t * row_count + column] = A(1);
      }
    }
  }

  // gate[t * stride + j] of hidden neurons j in [begin, end) for n <= kTokenTile tokens.
  void hidden_gates(int64_t leaf, int64_t begin, int64_t end, const int64_t* tokens, int n, A* gate,
                    int64_t stride) {
    auto* hidden = reinterpret_cast<A(*)[kTokenTile]>(hidden_.data());
    leaf_pre_activations(tree_, p_.shape, leaf, begin, end, static_cast<const T*>(p_.x), tokens, n,
                         hidden);
    activate_all(p_.leaf_activation, hidden[0], (end - begin) * kTokenTile, hidden[0]);
    for (int t = 0; t < n; ++t) {
      const A* scale = leaf_scale_of<A>(p_, tokens[t], tree_index_);
      for (int64_t j = begin; j < end; ++j) {
        gate[t * stride + j] = hidden[j - begin][t] * (scale ? scale[j] : A(1));
      }
    }
  }

  template <typename O>
  void write(O* output, const int64_t* tokens, int64_t n, int64_t row_count) {
    const int64_t width = p_.shape.output_width;
    // Partial sums must not be rounded.
    const int64_t block = std::is_same_v<O, A> ? kRowBlock : row_count;
    Write mode = write_mode(output, p_.shape, width, tree_index_);
    if (mode == Write::kStream && row_count > block) {
      mode = Write::kStore;
    }
    for (int64_t r = 0; r == 0 || r < row_count; r += block) {
      for (int64_t t = 0; t < n; t += kTokenTile) {
        O* ys[kTokenTile];
        const int tile = static_cast<int>(std::min<int64_t>(kTokenTile, n - t));
        for (int i = 0; i < tile; ++i) {
          ys[i] = output + tokens[t + i] * width;
        }
        combine(rows_.data() + r, coefficients_.data() + t * row_count + r, row_count,
                std::min(block, row_count - r), ys, tile, width, r == 0 ? mode : Write::kAdd);
      }
    }
  }

  static constexpr int64_t kGroup = 64;     // tokens that share the reading of a block of rows
  static constexpr int64_t kRowBlock = 48;  // rows that stay in the cache meanwhile

  const TreeForward& p_;
  Tree<T> tree_;
  int64_t tree_index_ = 0;
  std::vector<const T*> rows_;
  std::vector<A> coefficients_;  // [kGroup, rows]
  std::vector<A> hidden_;        // [kRowBlock, kTokenTile]
};

}  // namespace CPU_CAPABILITY
}  // namespace fff::cpu
