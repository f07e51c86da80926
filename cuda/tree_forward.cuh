// Hard tree, forward: a group of threads walks one token down all trees, then sums the rows it met.
#pragma once

#include "token_in_tree.cuh"

namespace fff::cuda {

// Item: a token.
template <typename T>
struct ForwardToken {
  using A = acc_t<T>;
  TreeForward p;
  A* gates;  // [tokens, trees, levels + leaf_width] what multiplies each row; unused without output

  static int64_t gates_size(const TreeForward& p) {
    const TreeShape& s = p.shape;
    return p.output ? s.tokens * s.trees * (s.levels + s.leaf_width) : 0;
  }

  template <typename Group>
  FFF_DEVICE void operator()(int64_t token, const Group& group) const {
    for (int64_t tree = 0; tree < p.shape.trees; ++tree) {
      const TokenInTree<T, Group> t(p, token, tree, group);
      const int64_t leaf = descend(t, group);
      if (group.lane == 0) {
        p.leaf[t.offset(1)] = leaf;
      }
      if (p.output) {
        hidden_gates(t, leaf, group);
      }
    }
    if (p.output) {
      group.sync();
      for (int64_t column = group.lane; column < p.shape.output_width; column += group.size) {
        store<T>(p.output, p.output_dtype, p.dtype, token * p.shape.output_width + column,
                 output(token, column, group));
      }
    }
  }

 private:
  FFF_DEVICE int64_t gates_per_tree() const { return p.shape.levels + p.shape.leaf_width; }

  template <typename Group>
  FFF_DEVICE int64_t descend(const TokenInTree<T, Group>& t, const Group& group) const {
    int64_t position = 0;
    for (int level = 0; level < p.shape.levels; ++level) {
      const A score = t.score((int64_t(1) << level) - 1 + position);
      if (group.lane == 0) {
        static_cast<A*>(p.scores)[t.offset(p.shape.levels) + level] = score;
        if (p.output) {
          gates[t.offset(gates_per_tree()) + level] = activate(p.node_activation, score);
        }
      }
      if (level < p.shape.decisions) {
        position = 2 * position + t.goes_right(score, level);
      }
    }
    return position;
  }

  template <typename Group>
  FFF_DEVICE void hidden_gates(const TokenInTree<T, Group>& t, int64_t leaf,
                               const Group& group) const {
    for (int64_t j = 0; j < p.shape.leaf_width; ++j) {
      const A hidden = activate(p.leaf_activation, t.pre_activation(leaf, j)) * t.leaf_scale(j);
      if (group.lane == 0) {
        gates[t.offset(gates_per_tree()) + p.shape.levels + j] = hidden;
      }
    }
  }

  template <typename Group>
  FFF_DEVICE A output(int64_t token, int64_t column, const Group& group) const {
    A sum = A(0);
    for (int64_t tree = 0; tree < p.shape.trees; ++tree) {
      const TokenInTree<T, Group> t(p, token, tree, group);
      const int64_t leaf = p.leaf[t.offset(1)];
      const A* gate = gates + t.offset(gates_per_tree());
      for (int level = 0; p.weights.node_output && level < p.shape.levels; ++level) {
        sum +=
            gate[level] * static_cast<A>(t.node_output(p.shape.node_on_path(leaf, level))[column]);
      }
      for (int64_t j = 0; j < p.shape.leaf_width; ++j) {
        sum += gate[p.shape.levels + j] * static_cast<A>(t.w2(leaf, j)[column]);
      }
      if (p.weights.b2) {
        sum += static_cast<A>(t.b2(leaf)[column]);
      }
    }
    return sum;
  }
};

namespace pipeline {

template <typename T, typename Queue>
void tree_forward(const TreeForward& p, Queue& queue) {
  using A = acc_t<T>;
  A* gates = queue.template array<A>(ForwardToken<T>::gates_size(p));
  for_each_item(ForwardToken<T>{p, gates}, p.shape.tokens, queue);
}

}  // namespace pipeline

}  // namespace fff::cuda
