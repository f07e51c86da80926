// Routing: groups of tokens walk down one tree together, so that a node's row is read once for all
// tokens that visit it.
#pragma once

#include <cstdint>
#include <vector>

#include "../decision.h"
#include "vec_activation.h"

namespace fff::cpu {
inline namespace CPU_CAPABILITY {

// One tree's rows, typed.
template <typename T>
struct Tree {
  const T* node_weight = nullptr;
  const T* node_bias = nullptr;
  const T* node_output = nullptr;
  const T* w1 = nullptr;
  const T* b1 = nullptr;
  const T* w2 = nullptr;
  const T* b2 = nullptr;

  Tree() = default;
  Tree(const TreeShape& s, const TreeWeights& w, int64_t tree)
      : node_weight(at(w.node_weight, tree * s.nodes() * s.input_width)),
        node_bias(at(w.node_bias, tree * s.nodes())),
        node_output(at(w.node_output, tree * s.nodes() * s.output_width)),
        w1(at(w.w1, tree * s.leaves() * s.leaf_width * s.input_width)),
        b1(at(w.b1, tree * s.leaves() * s.leaf_width)),
        w2(at(w.w2, tree * s.leaves() * s.leaf_width * s.output_width)),
        b2(at(w.b2, tree * s.leaves() * s.output_width)) {}

 private:
  static const T* at(const void* base, int64_t offset) {
    return base ? static_cast<const T*>(base) + offset : nullptr;
  }
};

// Where a token of score s goes: the one rule, for paths and for alternates. A NaN goes left.
template <typename A>
inline bool goes_right(const TreeForward& p, A s, int64_t token, int64_t tree, int level) {
  return fff::goes_right(p, s, (token * p.shape.trees + tree) * p.shape.levels + level);
}

// A node (r = 0), its left child (1) or its right child (2).
inline int64_t node_or_child(int64_t node, int r) {
  return r == 0 ? node : 2 * node + r;
}

// out[r][t] = <row of a node (Rows = 1), or of it and both its children (3), xs[t]>
template <int Rows, typename T>
inline void node_dots(const T* weight, int64_t node, const T* const* xs, int n, int64_t width,
                      acc_t<T> (*out)[kTokenTile]) {
  const T* row[Rows];
  for (int r = 0; r < Rows; ++r) {
    row[r] = weight + node_or_child(node, r) * width;
  }
  dots<Rows>(row, xs, n, width, out);
}

// The scores of those nodes.
template <int Rows, typename T>
inline void node_scores(const Tree<T>& tree, int64_t node, const T* const* xs, int n, int64_t width,
                        acc_t<T> (*s)[kTokenTile]) {
  node_dots<Rows>(tree.node_weight, node, xs, n, width, s);
  if (tree.node_bias) {
    for (int r = 0; r < Rows; ++r) {
      const auto bias = static_cast<acc_t<T>>(tree.node_bias[node_or_child(node, r)]);
      for (int t = 0; t < n; ++t) {
        s[r][t] += bias;
      }
    }
  }
}

// Tokens that walk level by level rather than subtree by subtree.
inline constexpr int64_t kWave = 16;

template <typename T>
class Walker {
  using A = acc_t<T>;

 public:
  explicit Walker(const TreeForward& p)
      : p_(p),
        shape_(p.shape),
        x_(static_cast<const T*>(p.x)),
        scores_(static_cast<A*>(p.scores)) {}

  // Walks `tree` from here on.
  void enter(int64_t tree) {
    tree_ = Tree<T>(shape_, p_.weights, tree);
    tree_index_ = tree;
  }

  // Takes `tokens` [count] from the node at `position` in `level` down to `end_level`, scoring
  // every node on the way, and calls arrive(position in end_level, tokens, count) once for every
  // place where some arrive, from left to right. `tokens` is reordered so that those who stay
  // together lie together.
  template <typename F>
  void walk(int64_t position, int level, int end_level, int64_t* tokens, int64_t count,
            const F& arrive) {
    if (static_cast<int64_t>(spare_.size()) < count) {
      spare_.resize(count);
    }
    descend(position, level, end_level, tokens, count, arrive);
  }

  // The last level's nodes when they route nothing (no leaf networks below them).
  void score_last(int64_t position, const int64_t* tokens, int64_t count) {
    A s[1][kTokenTile];
    const int level = shape_.levels - 1;
    for (int64_t i = 0; i < count; i += kTokenTile) {
      const int n = static_cast<int>(std::min<int64_t>(kTokenTile, count - i));
      score<1>(position, level, tokens + i, n, s);
    }
  }

 private:
  // Scores `Levels` levels of nodes (1: the node; 2: the node and both its children) for n tokens
  // and stores those visited.
  template <int Levels>
  void score(int64_t position, int level, const int64_t* tokens, int n, A (*s)[kTokenTile]) {
    constexpr int rows = (1 << Levels) - 1;
    const T* xs[kTokenTile];
    for (int i = 0; i < n; ++i) {
      xs[i] = x_ + tokens[i] * shape_.input_width;
    }
    node_scores<rows>(tree_, (int64_t(1) << level) - 1 + position, xs, n, shape_.input_width, s);
    for (int i = 0; i < n; ++i) {
      A* score = scores_ + (tokens[i] * shape_.trees + tree_index_) * shape_.levels + level;
      score[0] = s[0][i];
      if constexpr (Levels == 2) {
        score[1] = goes_right(s[0][i], tokens[i], level) ? s[2][i] : s[1][i];
      }
    }
  }

  bool goes_right(A s, int64_t token, int level) const {
    return cpu::goes_right(p_, s, token, tree_index_, level);
  }

  template <typename F>
  void descend(int64_t position, int level, int end_level, int64_t* tokens, int64_t count,
               const F& arrive) {
    if (level == end_level) {
      arrive(position, tokens, count);
      return;
    }
    if (count <= kWave) {
      wave(position, level, end_level, tokens, count, arrive);
      return;
    }
    if (level + 2 <= end_level) {
      descend_two(position, level, end_level, tokens, count, arrive);
      return;
    }
    A s[1][kTokenTile];
    int64_t left = 0, right = 0;
    for (int64_t i = 0; i < count; i += kTokenTile) {
      const int n = static_cast<int>(std::min<int64_t>(kTokenTile, count - i));
      score<1>(position, level, tokens + i, n, s);
      for (int j = 0; j < n; ++j) {
        const int64_t token = tokens[i + j];
        const bool r = goes_right(s[0][j], token, level);
        tokens[left] = token;
        spare_[right] = token;
        left += !r;
        right += r;
      }
    }
    std::copy_n(spare_.data(), right, tokens + left);
    if (left > 0) {
      descend(2 * position, level + 1, end_level, tokens, left, arrive);
    }
    if (right > 0) {
      descend(2 * position + 1, level + 1, end_level, tokens + left, right, arrive);
    }
  }

  // Few tokens go level by level: what one of them waits for from memory overlaps with the work of
  // the others.
  template <typename F>
  void wave(int64_t position, int level, int end_level, int64_t* tokens, int64_t count,
            const F& arrive) {
    int64_t positions[kWave], next_tokens[kWave], next_positions[kWave], right_tokens[kWave];
    std::fill_n(positions, count, position);
    for (; level < end_level; ++level) {
      int64_t out = 0;
      for (int64_t i = 0; i < count;) {
        const int64_t here = positions[i];
        int64_t right = 0;
        while (i < count && positions[i] == here) {
          int n = 1;
          while (n < kTokenTile && i + n < count && positions[i + n] == here) {
            ++n;
          }
          A s[1][kTokenTile];
          score<1>(here, level, tokens + i, n, s);
          for (int j = 0; j < n; ++j) {
            const int64_t token = tokens[i + j];
            const bool r = goes_right(s[0][j], token, level);
            next_tokens[out] = token;
            next_positions[out] = 2 * here;
            right_tokens[right] = token;
            out += !r;
            right += r;
          }
          i += n;
        }
        std::copy_n(right_tokens, right, next_tokens + out);
        std::fill_n(next_positions + out, right, 2 * here + 1);
        out += right;
      }
      std::copy_n(next_tokens, count, tokens);
      std::copy_n(next_positions, count, positions);
    }
    for (int64_t i = 0; i < count;) {
      int64_t end = i + 1;
      while (end < count && positions[end] == positions[i]) {
        ++end;
      }
      arrive(positions[i], tokens + i, end - i);
      i = end;
    }
  }

  // Two levels from one reading of x: all three rows, though only two of them are visited.
  template <typename F>
  void descend_two(int64_t position, int level, int end_level, int64_t* tokens, int64_t count,
                   const F& arrive) {
    A s[3][kTokenTile];
    int64_t counts[4] = {0, 0, 0, 0};
    if (static_cast<int64_t>(quarters_.size()) < 4 * count) {
      quarters_.resize(4 * count);
    }
    for (int64_t i = 0; i < count; i += kTokenTile) {
      const int n = static_cast<int>(std::min<int64_t>(kTokenTile, count - i));
      score<2>(position, level, tokens + i, n, s);
      for (int j = 0; j < n; ++j) {
        const int64_t token = tokens[i + j];
        const int first = goes_right(s[0][j], token, level);
        const int second = goes_right(s[1 + first][j], token, level + 1);
        const int quarter = 2 * first + second;
        quarters_[quarter * count + counts[quarter]++] = token;
      }
    }
    int64_t begin = 0;
    for (int q = 0; q < 4; ++q) {
      std::copy_n(quarters_.data() + q * count, counts[q], tokens + begin);
      begin += counts[q];
    }
    for (int q = 0; q < 4; ++q) {
      if (counts[q] > 0) {
        descend(4 * position + q, level + 2, end_level, tokens, counts[q], arrive);
      }
      tokens += counts[q];
    }
  }

  const TreeForward& p_;
  const TreeShape& shape_;
  const T* x_;
  A* scores_;
  Tree<T> tree_;
  int64_t tree_index_ = 0;
  std::vector<int64_t> spare_;
  std::vector<int64_t> quarters_;
};

}  // namespace CPU_CAPABILITY
}  // namespace fff::cpu
