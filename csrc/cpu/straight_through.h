// What the branches not taken would have contributed.
//
// Every decision on a token's path has an alternate: the other child, descended hard. A token
// brings one alternate per level, and the alternates of all tokens walk the tree together, so that
// a node's rows are read once for all who come by.
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
  // others [tokens in leaf order, levels], zeroed: receives <grad_output, contribution of the other
  // child> of every decision.
  Alternates(const TreeBackward& p, int64_t tree, const LeafOrder& order, A* others)
      : p_(p),
        s_(p.forward.shape),
        tree_index_(tree),
        tree_(s_, p.forward.weights, tree),
        order_(order),
        x_(static_cast<const T*>(p.forward.x)),
        grad_output_(static_cast<const T*>(p.grad_output)),
        others_(others),
        children_(2 * (s_.decisions + 1)),
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
      return;
    }
    const bool routes = level < s_.decisions;
    std::vector<Item>& left = children_[2 * std::min(level, s_.decisions)];
    std::vector<Item>& right = children_[2 * std::min(level, s_.decisions) + 1];
    left.clear();
    right.clear();
    for (int64_t i = 0; i < static_cast<int64_t>(items.size()); i += kTokenTile) {
      const int n = static_cast<int>(std::min<int64_t>(kTokenTile, items.size() - i));
      A s[kTokenTile];
      visit_node((int64_t(1) << level) - 1 + position, items.data() + i, n, s);
      for (int j = 0; routes && j < n; ++j) {
        (goes_right(s[j], items[i + j], level) ? right : left).push_back(items[i + j]);
      }
    }
    if (!routes) {
      return;
    }
    const int64_t first_right = ((2 * position + 1) << (s_.decisions - 1 - level));
    const int64_t middle =
        std::lower_bound(order_.leaf.begin() + begin, order_.leaf.begin() + end, first_right) -
        order_.leaf.begin();
    for (int64_t at = middle; at < end; ++at) {
      left.push_back({at, level});
    }
    for (int64_t at = begin; at < middle; ++at) {
      right.push_back({at, level});
    }
    if (begin < middle || !left.empty()) {
      visit(2 * position, level + 1, begin, middle, left);
    }
    if (middle < end || !right.empty()) {
      visit(2 * position + 1, level + 1, middle, end, right);
    }
  }

  void visit_node(int64_t node, const Item* items, int n, A* s) {
    const T* vectors[kTokenTile];
    A out[1][kTokenTile];
    for (int j = 0; j < n; ++j) {
      vectors[j] = x_ + order_.tokens[items[j].at] * s_.input_width;
    }
    const T* row = tree_.node_weight + node * s_.input_width;
    dots<1>(&row, vectors, n, s_.input_width, out);
    const A bias = tree_.node_bias ? static_cast<A>(tree_.node_bias[node]) : A(0);
    for (int j = 0; j < n; ++j) {
      s[j] = out[0][j] + bias;
    }
    if (tree_.node_output) {
      for (int j = 0; j < n; ++j) {
        vectors[j] = grad_output_ + order_.tokens[items[j].at] * s_.output_width;
      }
      row = tree_.node_output + node * s_.output_width;
      dots<1>(&row, vectors, n, s_.output_width, out);
      A gates[kTokenTile];
      activate_all(p_.forward.node_activation, s, n, gates);
      for (int j = 0; j < n; ++j) {
        other(items[j]) += gates[j] * out[0][j];
      }
    }
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

  A& other(const Item& item) { return others_[item.at * s_.levels + item.level]; }

  bool goes_right(A s, const Item& item, int level) const {
    const A* noise = static_cast<const A*>(p_.forward.noise);
    if (noise) {
      s += noise[(order_.tokens[item.at] * s_.trees + tree_index_) * s_.levels + level];
    }
    return p_.forward.tie_right ? s >= A(0) : s > A(0);
  }

  const TreeBackward& p_;
  const TreeShape& s_;
  const int64_t tree_index_;
  const Tree<T> tree_;
  const LeafOrder& order_;
  const T* x_;
  const T* grad_output_;
  A* others_;
  std::vector<std::vector<Item>> children_;  // [level][left, right]
  std::vector<A> pre_;                       // [leaf_width, kTokenTile]
  std::vector<A> dots_;                      // [leaf_width, kTokenTile]
};

template <typename T>
std::vector<acc_t<T>> alternate_contributions(const TreeBackward& p, int64_t tree,
                                              const LeafOrder& order) {
  const TreeShape& s = p.forward.shape;
  std::vector<acc_t<T>> others(s.tokens * s.levels, acc_t<T>(0));
  constexpr int64_t chunk = 1024;
  at::parallel_for(0, (s.tokens + chunk - 1) / chunk, 1, [&](int64_t begin, int64_t end) {
    Alternates<T> alternates(p, tree, order, others.data());
    for (int64_t c = begin; c < end; ++c) {
      alternates.run(c * chunk, std::min((c + 1) * chunk, s.tokens));
    }
  });
  return others;
}

}  // namespace CPU_CAPABILITY
}  // namespace fff::cpu
