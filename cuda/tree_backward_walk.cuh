// Hard tree, backward, token by token, for few tokens and float64:
//   1. per pair of a token and a tree a warp for each number that is a dot product or a walk: along
//      each node and hidden neuron of the path, and down each branch that was not taken
//   2. per pair the gradients of scores (backward_gates.cuh)
//   3. per token the gradient of x
//   4. per weight row the sum, over the tokens whose path has the row, of gate gradient x vector
// No atomics, and every sum has one order.
#pragma once

#include <array>
#include <vector>

#include "backward_gates.cuh"
#include "side_by_side.cuh"
#include "token_in_tree.cuh"

namespace fff::cuda {

template <typename T>
using WalkGates = BackwardGates<acc_t<T>, acc_t<T>>;

// Step 1. Item: one of a pair's numbers.
template <typename T>
struct BackwardNumber {
  using A = acc_t<T>;
  TreeBackward p;
  WalkGates<T> gates;

  // Of a pair: nodes, neurons and, if they are asked for, branches not taken and the leaf's bias.
  FFF_HOST_DEVICE int64_t nodes() const {
    return p.forward.weights.node_output ? p.forward.shape.levels : 0;
  }
  FFF_HOST_DEVICE int64_t numbers() const {
    const TreeShape& s = p.forward.shape;
    return nodes() + s.leaf_width + (p.straight_through ? s.decisions + 1 : 0);
  }
  int64_t items() const { return p.forward.shape.tokens * p.forward.shape.trees * numbers(); }

  FFF_DEVICE void operator()(int64_t item) const {
    const TreeShape& s = p.forward.shape;
    const int64_t pair = item / numbers();
    const int64_t number = item % numbers();
    const Path path(*this, pair);
    const int64_t below = number - nodes();
    if (below < 0) {
      path.node(static_cast<int>(number));
    } else if (below < s.leaf_width) {
      path.neuron(below);
    } else if (below < s.leaf_width + s.decisions) {
      path.other(static_cast<int>(below - s.leaf_width));
    } else if (s.leaf_width > 0) {
      path.bias();
    }
  }

 private:
  class Path {
   public:
    FFF_DEVICE Path(const BackwardNumber& body, int64_t pair)
        : p_(body.p),
          s_(body.p.forward.shape),
          gates_(body.gates),
          pair_(pair),
          t_(body.p.forward, pair / s_.trees, pair % s_.trees),
          leaf_(body.gates.leaf[pair]),
          grad_output_(row_of<T>(body.p.grad_output, pair / s_.trees, s_.output_width)) {}

    FFF_DEVICE void node(int level) const {
      put(gates_.along, pair_ * s_.levels + level,
          along(t_.node_output(s_.node_on_path(leaf_, level))));
    }

    FFF_DEVICE void neuron(int64_t j) const {
      const Activation activation = p_.forward.leaf_activation;
      const A pre = t_.pre_activation(leaf_, j);
      const A of_output = along(t_.w2(leaf_, j));
      const A scale = t_.leaf_scale(j);
      const A hidden = activate(activation, pre) * scale;
      const int64_t i = pair_ * s_.leaf_width + j;
      put(gates_.hidden, i, hidden);
      put(gates_.grad_hidden, i, of_output * scale * activation_slope(activation, pre));
      if (p_.straight_through) {
        put(gates_.leaf_value, pair_ * gates_.leaf_parts + j, hidden * of_output);
      }
    }

    FFF_DEVICE void bias() const {
      put(gates_.leaf_value, pair_ * gates_.leaf_parts + s_.leaf_width, bias_value(leaf_));
    }

    // The child not taken at `level`, descended hard.
    FFF_DEVICE void other(int level) const {
      const int64_t i = pair_ * s_.levels + level, to = pair_ * s_.decisions + level;
      if (decision_slope(p_, static_cast<const A*>(p_.scores)[i], i) == A(0)) {
        put(gates_.other, to, A(0));
        return;
      }
      const auto [nodes, leaf] = follow_other<A>(
          p_.forward, pair_, leaf_, level, [&](int64_t node) { return t_.score(node); },
          [&](int64_t node) { return along(t_.node_output(node)); });
      A value = nodes + bias_value(leaf);
      for (int64_t j = 0; j < s_.leaf_width; ++j) {
        value += activate(p_.forward.leaf_activation, t_.pre_activation(leaf, j)) *
                 t_.leaf_scale(j) * along(t_.w2(leaf, j));
      }
      put(gates_.other, to, value);
    }

   private:
    FFF_DEVICE A along(const T* row) const {
      return dot_of_rows(row, grad_output_, s_.output_width);
    }
    FFF_DEVICE A bias_value(int64_t leaf) const {
      return p_.forward.weights.b2 ? along(t_.b2(leaf)) : A(0);
    }
    FFF_DEVICE static void put(A* array, int64_t i, A value) {
      if (lane_index() == 0) {
        array[i] = value;
      }
    }

    const TreeBackward& p_;
    const TreeShape& s_;
    const WalkGates<T>& gates_;
    const int64_t pair_;
    const TokenInTree<T> t_;
    const int64_t leaf_;
    const T* grad_output_;
  };
};

// Step 3. Item: 32 columns of a token.
template <typename T>
struct BackwardX {
  using A = acc_t<T>;
  TreeBackward p;
  WalkGates<T> gates;

  FFF_HOST_DEVICE int64_t column_blocks() const {
    return (p.forward.shape.input_width + kWarpSize - 1) / kWarpSize;
  }
  int64_t items() const { return p.forward.shape.tokens * column_blocks(); }

  FFF_DEVICE void operator()(int64_t item) const {
    const TreeShape& s = p.forward.shape;
    const int64_t token = item / column_blocks();
    const int64_t column = item % column_blocks() * kWarpSize + lane_index();
    if (column >= s.input_width) {
      return;
    }
    A sum = A(0);
    for (int64_t tree = 0; tree < s.trees; ++tree) {
      const int64_t pair = token * s.trees + tree;
      const TokenInTree<T> t(p.forward, token, tree);
      const int64_t leaf = gates.leaf[pair];
      FFF_UNROLL_BY(4)
      for (int level = 0; p.scores_have_gradients() && level < s.levels; ++level) {
        sum += gates.score[pair * s.levels + level] *
               static_cast<A>(t.node_weight(s.node_on_path(leaf, level))[column]);
      }
      FFF_UNROLL_BY(4)
      for (int64_t j = 0; j < s.leaf_width; ++j) {
        sum += gates.grad_hidden[pair * s.leaf_width + j] * static_cast<A>(t.w1(leaf, j)[column]);
      }
    }
    store<T>(p.grad_x, p.grad_x_dtype, p.forward.dtype, token * s.input_width + column, sum);
  }
};

// Step 4. Item: some columns of one row of a weight, of all trees' rows.
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
  int64_t items() const { return gradient || bias ? shape.trees * rows_per_tree() * blocks() : 0; }

  FFF_DEVICE void operator()(int64_t item) const {
    const int64_t row = item / blocks();
    const int64_t block = item % blocks();
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

    const int64_t first = block * kColumns * kWarpSize + lane_index();
    const int64_t end = gradient ? width : 0;
    A sums[kColumns] = {};
    A sum = A(0);
    for (int64_t token = 0; token < shape.tokens; ++token) {
      if (leaf[token * shape.trees + tree] >> (shape.decisions - level) != position) {
        continue;
      }
      const A c = coefficients ? coefficients[(token * shape.trees + tree) * slots + slot] : A(1);
      sum += c;
      for (int i = 0; i < kColumns; ++i) {
        const int64_t column = first + i * kWarpSize;
        if (column < end) {
          sums[i] += c * static_cast<A>(vectors[token * width + column]);
        }
      }
    }
    for (int i = 0; i < kColumns; ++i) {
      const int64_t column = first + i * kWarpSize;
      if (column < end) {
        store<T>(gradient, dtype, kDType<T>, row * width + column, sums[i]);
      }
    }
    if (bias && block == 0 && lane_index() == 0) {
      store<T>(bias, dtype, kDType<T>, row, sum);
    }
  }

 private:
  FFF_HOST_DEVICE int64_t blocks() const {
    constexpr int64_t columns = kColumns * kWarpSize;
    return gradient && width > 0 ? (width + columns - 1) / columns : 1;
  }
};

// Every weight's rows; an entry without outputs has no items.
template <typename T>
std::array<BackwardRow<T>, 5> backward_rows(const TreeBackward& p, const WalkGates<T>& gates) {
  const TreeShape& s = p.forward.shape;
  const T* x = static_cast<const T*>(p.forward.x);
  const T* grad = static_cast<const T*>(p.grad_output);
  const DType to = p.grad_weights_dtype;
  return {{{s, gates.leaf, gates.score, x, s.input_width, true, s.levels, p.grad_node_weight,
            p.grad_node_bias, to},
           {s, gates.leaf, gates.node_gate, grad, s.output_width, true, s.levels,
            p.grad_node_output, nullptr, to},
           {s, gates.leaf, gates.grad_hidden, x, s.input_width, false, s.leaf_width, p.grad_w1,
            p.grad_b1, to},
           {s, gates.leaf, gates.hidden, grad, s.output_width, false, s.leaf_width, p.grad_w2,
            nullptr, to},
           {s, gates.leaf, nullptr, grad, s.output_width, false, 1, p.grad_b2, nullptr, to}}};
}

namespace pipeline {

template <typename T, typename Queue>
void tree_backward_walk(const TreeBackward& p, Queue& queue) {
  using A = acc_t<T>;
  const TreeShape& s = p.forward.shape;
  const int64_t pairs = s.tokens * s.trees;
  const WalkGates<T> gates(p, s.leaf_width > 0 ? s.leaf_width + 1 : 0, false, queue);
  for_each_thread(CopyLeaves{s, p.leaf, gates.leaf}, pairs, queue);
  const BackwardNumber<T> numbers = {p, gates};
  for_each_item(numbers, numbers.items(), queue);
  if (p.scores_have_gradients()) {
    for_each_thread(ScoreGradients<A, A>{p, gates}, pairs, queue);
  }
  if (p.grad_x) {
    const BackwardX<T> x = {p, gates};
    for_each_item(x, x.items(), queue);
  }
  std::vector<ForEachItem<BackwardRow<T>>> weights;
  for (const BackwardRow<T>& rows : backward_rows<T>(p, gates)) {
    if (rows.items() > 0) {
      weights.push_back({rows, rows.items()});
    }
  }
  launch_side_by_side(weights, queue);
}

}  // namespace pipeline

}  // namespace fff::cuda
