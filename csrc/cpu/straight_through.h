// What the branches not taken would have contributed.
//
// Every decision on a token's path has an alternate: the other child, descended hard. A token
// brings one alternate for each of its decisions that has a gradient, and the alternates of all
// tokens walk the tree together, so that a node's rows are read once for all who come by.
#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "leaf_network.h"
#include "leaf_order.h"

namespace fff::cpu {
inline namespace CPU_CAPABILITY {

template <typename T>
class Alternates {
  using A = acc_t<T>;

 public:
  // slopes [tokens in leaf order, levels]: decision_slope of every decision.
  // others, the same shape, zeroed: receives <grad_output, contribution of the other child> where
  // that slope is not 0.
  Alternates(const TreeBackward& p, int64_t tree, const LeafOrder& order, const A* slopes,
             A* others)
      : p_(p),
        s_(p.forward.shape),
        tree_index_(tree),
        tree_(s_, p.forward.weights, tree),
        order_(order),
        x_(static_cast<const T*>(p.forward.x)),
        grad_output_(static_cast<const T*>(p.grad_output)),
        slopes_(slopes),
        others_(others),
        children_(4 * s_.levels),
        pre_(s_.leaf_width * kTokenTile),
        dots_(s_.leaf_width * kTokenTile) {}

  // Tokens [begin, end) of the leaf order.
  void run(int64_t begin, int64_t end) { visit(0, 0, begin, end, {}); }

 private:
  struct Item {
    int64_t at;  // place of the token in the leaf order
    int level;   // the decision whose alternate this is
  };

  // The node at `position` in `level`: tokens [begin, end) pass it on their paths, `items` on their
  // alternates.
  void visit(int64_t position, int level, int64_t begin, int64_t end,
             const std::vector<Item>& items) {
    if (level == s_.levels) {
      visit_leaf(position, items);
    } else if (level + 2 <= s_.levels && static_cast<int64_t>(items.size()) >= kTokenTile) {
      visit_levels<2>(position, level, begin, end, items);
    } else {
      visit_levels<1>(position, level, begin, end, items);
    }
  }

  // Levels = 2 scores the node and both its children at once: a third of the products is for
  // nothing, but x and grad_output are read half as often.
  template <int Levels>
  void visit_levels(int64_t position, int level, int64_t begin, int64_t end,
                    const std::vector<Item>& items) {
    constexpr int exits = 1 << Levels;
    std::vector<Item>* below = children_.data() + 4 * level;
    std::for_each(below, below + exits, [](std::vector<Item>& list) { list.clear(); });
    for_tiles(static_cast<int64_t>(items.size()),
              [&](int64_t i, int n) { pass<Levels>(position, level, items.data() + i, n, below); });

    // Where the tokens on their paths leave: those of exit q are [bound[q], bound[q + 1]).
    const int routed = std::min(Levels, s_.decisions - level);
    if (routed == 0) {
      return;
    }
    int64_t bound[exits + 1];
    bound[0] = begin;
    for (int q = 1; q <= 1 << routed; ++q) {
      bound[q] = first_at((position << routed) + q, level + routed, bound[q - 1], end);
    }
    if constexpr (Levels == 2) {
      const int64_t middle = bound[1 << (routed - 1)];
      branch_off(2 * position + 1, level + 1, begin, middle, level, below + 2);
      branch_off(2 * position, level + 1, middle, end, level, below);
      if (routed == 1) {
        return;
      }
    }
    for (int q = 0; q < exits; ++q) {
      for (int64_t at = bound[q]; at < bound[q + 1]; ++at) {
        if (has_slope(at, level + Levels - 1)) {
          below[q ^ 1].push_back({at, level + Levels - 1});
        }
      }
    }
    for (int q = 0; q < exits; ++q) {
      if (bound[q] < bound[q + 1] || !below[q].empty()) {
        visit(exits * position + q, level + Levels, bound[q], bound[q + 1], below[q]);
      }
    }
  }

  // The alternates that tokens [begin, end) bring to a node when their paths take its sibling.
  void branch_off(int64_t position, int level, int64_t begin, int64_t end, int decision,
                  std::vector<Item>* below) {
    Item items[kTokenTile];
    int n = 0;
    for (int64_t at = begin; at < end; ++at) {
      if (has_slope(at, decision)) {
        items[n++] = {at, decision};
      }
      if (n == kTokenTile || (n > 0 && at + 1 == end)) {
        pass<1>(position, level, items, n, below);
        n = 0;
      }
    }
  }

  // Takes n <= kTokenTile alternates through `Levels` levels and hands them to the lists of the
  // exits.
  template <int Levels>
  void pass(int64_t position, int level, const Item* items, int n, std::vector<Item>* below) {
    constexpr int rows = (1 << Levels) - 1;
    const int64_t node = (int64_t(1) << level) - 1 + position;
    A s[rows][kTokenTile] = {};
    A value[rows][kTokenTile] = {};
    const T* vectors[kTokenTile];
    point_to(x_, s_.input_width, items, n, vectors);
    node_scores<rows>(tree_, node, vectors, n, s_.input_width, s);
    if (tree_.node_output) {
      A gates[rows][kTokenTile];
      activate_all(p_.forward.node_activation, s[0], rows * kTokenTile, gates[0]);
      point_to(grad_output_, s_.output_width, items, n, vectors);
      node_dots<rows>(tree_.node_output, node, vectors, n, s_.output_width, value);
      for (int r = 0; r < rows; ++r) {
        for (int j = 0; j < n; ++j) {
          value[r][j] *= gates[r][j];
        }
      }
    }
    for (int j = 0; j < n; ++j) {
      A sum = value[0][j];
      int exit = goes_right(s[0][j], items[j], level);
      if constexpr (Levels == 2) {
        sum += value[1 + exit][j];
        exit = 2 * exit + goes_right(s[1 + exit][j], items[j], level + 1);
      }
      other(items[j]) += sum;
      below[exit].push_back(items[j]);
    }
  }

  void point_to(const T* rows, int64_t width, const Item* items, int n, const T** out) const {
    for (int j = 0; j < n; ++j) {
      out[j] = rows + order_.tokens[items[j].at] * width;
    }
  }

  template <typename F>
  static void for_tiles(int64_t count, const F& f) {
    for (int64_t i = 0; i < count; i += kTokenTile) {
      f(i, static_cast<int>(std::min<int64_t>(kTokenTile, count - i)));
    }
  }

  // The first token in [begin, end) of the leaf order whose path is at `position` in `level`, or
  // further right.
  int64_t first_at(int64_t position, int level, int64_t begin, int64_t end) const {
    const auto leaf = order_.leaf.begin();
    return std::lower_bound(leaf + begin, leaf + end, position << (s_.decisions - level)) - leaf;
  }

  void visit_leaf(int64_t leaf, const std::vector<Item>& items) {
    auto* pre = reinterpret_cast<A(*)[kTokenTile]>(pre_.data());
    auto* dots = reinterpret_cast<A(*)[kTokenTile]>(dots_.data());
    for (int64_t i = 0; i < static_cast<int64_t>(items.size()); i += kTokenTile) {
      const int n = static_cast<int>(std::min<int64_t>(kTokenTile, items.size() - i));
      int64_t tokens[kTokenTile];
      for (int j = 0; j < n; ++j) {
        tokens[j] = order_.tokens[items[i + j].at];
      }
      A value[kTokenTile];
      leaf_pre_activations(tree_, s_, leaf, x_, tokens, n, pre);
      leaf_dots(tree_.w2, s_, leaf, grad_output_, tokens, n, s_.output_width, dots);
      leaf_bias_dots(tree_, s_, leaf, grad_output_, tokens, n, value);
      activate_all(p_.forward.leaf_activation, pre[0], s_.leaf_width * kTokenTile, pre[0]);
      for (int j = 0; j < n; ++j) {
        const A* scale = leaf_scale_of<A>(p_.forward, tokens[j], tree_index_);
        for (int64_t h = 0; h < s_.leaf_width; ++h) {
          value[j] += pre[h][j] * (scale ? scale[h] : A(1)) * dots[h][j];
        }
        other(items[i + j]) += value[j];
      }
    }
  }

  bool has_slope(int64_t at, int decision) const {
    return slopes_[at * s_.levels + decision] != A(0);
  }

  A& other(const Item& item) { return others_[item.at * s_.levels + item.level]; }

  bool goes_right(A s, const Item& item, int level) const {
    return cpu::goes_right(p_.forward, s, order_.tokens[item.at], tree_index_, level);
  }

  const TreeBackward& p_;
  const TreeShape& s_;
  const int64_t tree_index_;
  const Tree<T> tree_;
  const LeafOrder& order_;
  const T* x_;
  const T* grad_output_;
  const A* slopes_;
  A* others_;
  std::vector<std::vector<Item>> children_;  // [level][exit]
  std::vector<A> pre_;                       // [leaf_width, kTokenTile]
  std::vector<A> dots_;                      // [leaf_width, kTokenTile]
};

template <typename T>
std::vector<acc_t<T>> alternate_contributions(const TreeBackward& p, int64_t tree,
                                              const LeafOrder& order,
                                              const std::vector<acc_t<T>>& slopes) {
  const TreeShape& s = p.forward.shape;
  std::vector<acc_t<T>> others(s.tokens * s.levels, acc_t<T>(0));
  constexpr int64_t chunk = 2048;
  at::parallel_for(0, (s.tokens + chunk - 1) / chunk, 1, [&](int64_t begin, int64_t end) {
    Alternates<T> alternates(p, tree, order, slopes.data(), others.data());
    for (int64_t c = begin; c < end; ++c) {
      alternates.run(c * chunk, std::min((c + 1) * chunk, s.tokens));
    }
  });
  return others;
}

}  // namespace CPU_CAPABILITY
}  // namespace fff::cpu
