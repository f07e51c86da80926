// Hard tree, backward, token by token, in two passes:
//   1. per token: the gradients of its gates (scores, hidden activations), then that of x;
//   2. per weight row: the sum, over the tokens whose path has the row, of gate gradient x vector.
// No atomics, and every sum has one order.
#pragma once

#include <array>

#include "decision.h"
#include "token_in_tree.cuh"

namespace fff::cuda {

// What the first pass leaves for the second.
template <typename A>
struct GateGradients {
  A* score;        // [tokens, trees, levels] gradient of the score; null when scores have none
  A* node_gate;    // [tokens, trees, levels] activation(score); null without node outputs
  A* hidden;       // [tokens, trees, leaf_width] activation, scaled
  A* grad_hidden;  // [tokens, trees, leaf_width] gradient of the pre-activation

  // Elements of `memory`.
  static int64_t size(const TreeBackward& p) {
    const TreeShape& s = p.forward.shape;
    return s.tokens * s.trees * (2 * s.levels + 2 * s.leaf_width);
  }

  GateGradients(const TreeBackward& p, A* memory) {
    const TreeShape& s = p.forward.shape;
    const bool node_output = p.forward.weights.node_output;
    score = p.scores_have_gradients() ? memory : nullptr;
    memory += s.tokens * s.trees * s.levels;
    node_gate = node_output ? memory : nullptr;
    memory += s.tokens * s.trees * s.levels;
    hidden = memory;
    grad_hidden = hidden + s.tokens * s.trees * s.leaf_width;
  }
};

// The leaf a token reached.
FFF_DEVICE inline int64_t reached_leaf(const TreeShape& s, const int64_t* leaf, int64_t token,
                                       int64_t tree) {
  return s.inside(leaf[token * s.trees + tree]);
}

// Item: a token.
template <typename T>
struct BackwardToken {
  using A = acc_t<T>;
  TreeBackward p;
  GateGradients<A> gates;

  template <typename Group>
  FFF_DEVICE void operator()(int64_t token, const Group& group) const {
    const TreeShape& s = p.forward.shape;
    for (int64_t tree = 0; tree < s.trees; ++tree) {
      const Path<Group> path(*this, token, tree, group);
      const A leaf_value = path.hidden_gradients();
      if (gates.score) {
        path.score_gradients(leaf_value);
      }
    }
    if (p.grad_x) {
      group.sync();
      for (int64_t column = group.lane; column < s.input_width; column += group.size) {
        store<T>(p.grad_x, p.grad_x_dtype, p.forward.dtype, token * s.input_width + column,
                 grad_x(token, column, group));
      }
    }
  }

 private:
  template <typename Group>
  class Path {
   public:
    FFF_DEVICE Path(const BackwardToken& body, int64_t token, int64_t tree, const Group& group)
        : p_(body.p),
          s_(body.p.forward.shape),
          gates_(body.gates),
          t_(body.p.forward, token, tree, group),
          leaf_(reached_leaf(s_, body.p.leaf, token, tree)),
          grad_output_(row_of<T>(body.p.grad_output, token, s_.output_width)),
          group_(group) {}

    // Returns <grad_output, what the leaf network contributes>; without b2 where nobody asks.
    FFF_DEVICE A hidden_gradients() const {
      A value = p_.straight_through ? bias_value(leaf_) : A(0);
      for (int64_t j = 0; j < s_.leaf_width; ++j) {
        const A pre = t_.pre_activation(leaf_, j);
        const A along = along_grad(t_.w2(leaf_, j));
        const A scale = t_.leaf_scale(j);
        const A hidden = activate(p_.forward.leaf_activation, pre) * scale;
        value += hidden * along;
        if (group_.lane == 0) {
          const int64_t i = t_.offset(s_.leaf_width) + j;
          gates_.hidden[i] = hidden;
          gates_.grad_hidden[i] = along * scale * activation_slope(p_.forward.leaf_activation, pre);
        }
      }
      return value;
    }

    // From the leaf up, so that what the taken side of each decision contributes is at hand there.
    FFF_DEVICE void score_gradients(A taken) const {
      for (int level = s_.levels - 1; level >= 0; --level) {
        const int64_t i = t_.offset(s_.levels) + level;
        const A score = static_cast<const A*>(p_.scores)[i];
        A grad = p_.grad_scores ? static_cast<const A*>(p_.grad_scores)[i] : A(0);
        const bool decides = p_.straight_through && level < s_.decisions;
        const A slope = decides ? decision_slope(p_, score, i) : A(0);
        if (slope != A(0)) {
          const A other = other_value(level);
          grad += slope * (s_.turns_right(leaf_, level) ? taken - other : other - taken);
        }
        if (gates_.node_gate) {
          const A along = along_grad(t_.node_output(s_.node_on_path(leaf_, level)));
          const A gate = activate(p_.forward.node_activation, score);
          grad += along * activation_slope(p_.forward.node_activation, score);
          taken += gate * along;
          if (group_.lane == 0) {
            gates_.node_gate[i] = gate;
          }
        }
        if (group_.lane == 0) {
          gates_.score[i] = grad;
        }
      }
    }

   private:
    FFF_DEVICE A along_grad(const T* row) const {
      return dot(row, grad_output_, s_.output_width, group_);
    }

    FFF_DEVICE A bias_value(int64_t leaf) const {
      return p_.forward.weights.b2 ? along_grad(t_.b2(leaf)) : A(0);
    }

    // <grad_output, contribution> of the child not taken at `level`, descended hard.
    FFF_DEVICE A other_value(int level) const {
      int64_t position = (leaf_ >> (s_.decisions - 1 - level)) ^ 1;
      A value = A(0);
      for (++level; level < s_.levels; ++level) {
        const int64_t node = (int64_t(1) << level) - 1 + position;
        const A score = t_.score(node);
        if (gates_.node_gate) {
          value += activate(p_.forward.node_activation, score) * along_grad(t_.node_output(node));
        }
        if (level < s_.decisions) {
          position = 2 * position + t_.goes_right(score, level);
        }
      }
      value += bias_value(position);
      for (int64_t j = 0; j < s_.leaf_width; ++j) {
        value += activate(p_.forward.leaf_activation, t_.pre_activation(position, j)) *
                 t_.leaf_scale(j) * along_grad(t_.w2(position, j));
      }
      return value;
    }

    const TreeBackward& p_;
    const TreeShape& s_;
    const GateGradients<A>& gates_;
    const TokenInTree<T, Group> t_;
    const int64_t leaf_;
    const T* grad_output_;
    const Group& group_;
  };

  template <typename Group>
  FFF_DEVICE A grad_x(int64_t token, int64_t column, const Group& group) const {
    const TreeShape& s = p.forward.shape;
    A sum = A(0);
    for (int64_t tree = 0; tree < s.trees; ++tree) {
      const TokenInTree<T, Group> t(p.forward, token, tree, group);
      const int64_t leaf = reached_leaf(s, p.leaf, token, tree);
      for (int level = 0; gates.score && level < s.levels; ++level) {
        sum += gates.score[t.offset(s.levels) + level] *
               static_cast<A>(t.node_weight(s.node_on_path(leaf, level))[column]);
      }
      for (int64_t j = 0; j < s.leaf_width; ++j) {
        sum +=
            gates.grad_hidden[t.offset(s.leaf_width) + j] * static_cast<A>(t.w1(leaf, j)[column]);
      }
    }
    return sum;
  }
};

// Item: some columns of one row of a weight, of all trees' rows.
template <typename T>
struct BackwardRow {
  using A = acc_t<T>;
  TreeShape shape;
  const int64_t* leaf;    // [tokens, trees]
  const A* coefficients;  // [tokens, trees, slots]; null: all 1
  const T* vectors;       // [tokens, width]
  int64_t width;
  bool of_nodes;  // a node's row, `slots` is levels; or one of `slots` rows of a leaf
  int64_t slots;
  // outputs, each null when not wanted
  void* gradient;  // [rows, width] of `dtype`: sum of coefficient x vector
  void* bias;      // [rows] of `dtype`: sum of coefficients
  DType dtype;     // T's or A's

  static constexpr int kColumns = 8;  // of one thread

  FFF_HOST_DEVICE int64_t rows_per_tree() const {
    return of_nodes ? shape.nodes() : shape.leaves() * slots;
  }
  int64_t items(int group_size) const {
    return gradient || bias ? shape.trees * rows_per_tree() * blocks(group_size) : 0;
  }

  template <typename Group>
  FFF_DEVICE void operator()(int64_t item, const Group& group) const {
    const int64_t row = item / blocks(group.size);
    const int64_t block = item % blocks(group.size);
    const int64_t tree = row / rows_per_tree();
    const int64_t row_in_tree = row % rows_per_tree();
    // The row belongs to the node or leaf at `position` in `level`.
    int level;
    int64_t position;
    int64_t slot;
    if (of_nodes) {
      level = level_of(row_in_tree);
      position = row_in_tree - ((int64_t(1) << level) - 1);
      slot = level;
    } else {
      level = shape.decisions;
      position = row_in_tree / slots;
      slot = row_in_tree % slots;
    }

    const int64_t first = block * kColumns * group.size + group.lane;
    const int64_t end = gradient ? width : 0;
    A sums[kColumns] = {};
    A sum = A(0);
    for (int64_t token = 0; token < shape.tokens; ++token) {
      if (reached_leaf(shape, leaf, token, tree) >> (shape.decisions - level) != position) {
        continue;
      }
      const A c = coefficients ? coefficients[(token * shape.trees + tree) * slots + slot] : A(1);
      sum += c;
      for (int i = 0; i < kColumns; ++i) {
        const int64_t column = first + i * group.size;
        if (column < end) {
          sums[i] += c * static_cast<A>(vectors[token * width + column]);
        }
      }
    }
    for (int i = 0; i < kColumns; ++i) {
      const int64_t column = first + i * group.size;
      if (column < end) {
        store<T>(gradient, dtype, kDType<T>, row * width + column, sums[i]);
      }
    }
    if (bias && block == 0 && group.lane == 0) {
      store<T>(bias, dtype, kDType<T>, row, sum);
    }
  }

 private:
  FFF_HOST_DEVICE int64_t blocks(int group_size) const {
    const int64_t columns = int64_t(kColumns) * group_size;
    return gradient && width > 0 ? (width + columns - 1) / columns : 1;
  }
};

// Every weight's rows; an entry without outputs has no items.
template <typename T>
std::array<BackwardRow<T>, 5> backward_rows(const TreeBackward& p,
                                            const GateGradients<acc_t<T>>& gates) {
  const TreeShape& s = p.forward.shape;
  const T* x = static_cast<const T*>(p.forward.x);
  const T* grad = static_cast<const T*>(p.grad_output);
  const DType to = p.grad_weights_dtype;
  return {
      {{s, p.leaf, gates.score, x, s.input_width, true, s.levels, p.grad_node_weight,
        p.grad_node_bias, to},
       {s, p.leaf, gates.node_gate, grad, s.output_width, true, s.levels, p.grad_node_output,
        nullptr, to},
       {s, p.leaf, gates.grad_hidden, x, s.input_width, false, s.leaf_width, p.grad_w1, p.grad_b1,
        to},
       {s, p.leaf, gates.hidden, grad, s.output_width, false, s.leaf_width, p.grad_w2, nullptr, to},
       {s, p.leaf, nullptr, grad, s.output_width, false, 1, p.grad_b2, nullptr, to}}};
}

namespace pipeline {

template <typename T, typename Queue>
void tree_backward_walk(const TreeBackward& p, Queue& queue) {
  using A = acc_t<T>;
  const GateGradients<A> gates(p, queue.template array<A>(GateGradients<A>::size(p)));
  for_each_item(BackwardToken<T>{p, gates}, p.forward.shape.tokens, queue);
  for (const BackwardRow<T>& rows : backward_rows<T>(p, gates)) {
    for_each_item(rows, rows.items(kWarpSize), queue);
  }
}

}  // namespace pipeline

}  // namespace fff::cuda
