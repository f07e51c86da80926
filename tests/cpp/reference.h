// What the operators compute, said as literally as possible: one token at a time, in double, with
// nothing shared with the kernels but their parameter structs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/kernels.h"

namespace fff::reference {

inline const double* doubles(const void* p) {
  return static_cast<const double*>(p);
}

inline double logistic(double z) {
  return 1 / (1 + std::exp(-z));
}

inline double value_of(Activation kind, double s) {
  switch (kind) {
    case Activation::kIdentity:
      return s;
    case Activation::kRelu:
      return s < 0 ? 0 : s;
    case Activation::kGelu:
      return s * std::erfc(-s / std::sqrt(2.0)) / 2;
    case Activation::kGeluTanh:
      return s * logistic(2 * std::sqrt(2 / M_PI) * (s + 0.044715 * std::pow(s, 3)));
    case Activation::kSilu:
      return s * logistic(s);
  }
  return NAN;
}

inline double slope_of(Activation kind, double s) {
  switch (kind) {
    case Activation::kIdentity:
      return 1;
    case Activation::kRelu:
      return s <= 0 ? 0 : 1;
    case Activation::kGelu:
      return std::erfc(-s / std::sqrt(2.0)) / 2 + s * std::exp(-s * s / 2) / std::sqrt(2 * M_PI);
    case Activation::kGeluTanh: {
      const double c = logistic(2 * std::sqrt(2 / M_PI) * (s + 0.044715 * std::pow(s, 3)));
      return c + s * c * (1 - c) * 2 * std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * s * s);
    }
    case Activation::kSilu:
      return logistic(s) + s * logistic(s) * (1 - logistic(s));
  }
  return NAN;
}

inline double dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    sum += a[i] * b[i];
  }
  return sum;
}

// y += c * row
inline void add(double* y, double c, const double* row, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    y[i] += c * row[i];
  }
}

// One token in one tree. Nodes are heap indices; below the last level the same count goes on with
// the leaves.
struct TokenInTree {
  const TreeForward& p;
  const TreeShape& s;
  int64_t token, tree;
  const double* x;

  TokenInTree(const TreeForward& p, int64_t token, int64_t tree)
      : p(p), s(p.shape), token(token), tree(tree), x(doubles(p.x) + token * p.shape.input_width) {}

  int64_t nodes() const { return (int64_t(1) << s.levels) - 1; }
  int64_t node_row(int64_t node) const { return tree * nodes() + node; }
  int64_t leaf_row(int64_t leaf) const { return (tree << s.decisions) + leaf; }

  double score(int64_t node) const {
    const double* w = doubles(p.weights.node_weight) + node_row(node) * s.input_width;
    const double bias = p.weights.node_bias ? doubles(p.weights.node_bias)[node_row(node)] : 0;
    return dot(w, x, s.input_width) + bias;
  }

  int64_t child(int64_t node, int level, double score) const {
    if (p.noise) {
      score += doubles(p.noise)[(token * s.trees + tree) * s.levels + level];
    }
    const bool right = p.tie_right ? score >= 0 : score > 0;
    return right ? 2 * node + 2 : 2 * node + 1;
  }

  double pre_activation(int64_t leaf, int64_t j) const {
    const int64_t row = leaf_row(leaf) * s.leaf_width + j;
    const double bias = p.weights.b1 ? doubles(p.weights.b1)[row] : 0;
    return dot(doubles(p.weights.w1) + row * s.input_width, x, s.input_width) + bias;
  }

  double leaf_scale(int64_t j) const {
    return p.leaf_scale ? doubles(p.leaf_scale)[(token * s.trees + tree) * s.leaf_width + j] : 1;
  }

  // y += what lies below and including `node` of `level` contributes, descended hard.
  void contribute(int64_t node, int level, double* y) const {
    if (level == s.levels) {
      leaf_network(node - nodes(), y);
      return;
    }
    const double own = score(node);
    if (p.weights.node_output) {
      add(y, value_of(p.node_activation, own),
          doubles(p.weights.node_output) + node_row(node) * s.output_width, s.output_width);
    }
    if (level < s.decisions) {
      contribute(child(node, level, own), level + 1, y);
    }
  }

  void leaf_network(int64_t leaf, double* y) const {
    for (int64_t j = 0; j < s.leaf_width; ++j) {
      add(y, value_of(p.leaf_activation, pre_activation(leaf, j)) * leaf_scale(j),
          doubles(p.weights.w2) + (leaf_row(leaf) * s.leaf_width + j) * s.output_width,
          s.output_width);
    }
    if (p.weights.b2) {
      add(y, 1, doubles(p.weights.b2) + leaf_row(leaf) * s.output_width, s.output_width);
    }
  }
};

inline void tree_forward(const TreeForward& p) {
  const TreeShape& s = p.shape;
  for (int64_t token = 0; token < s.tokens; ++token) {
    double* y = p.output ? static_cast<double*>(p.output) + token * s.output_width : nullptr;
    for (int64_t o = 0; y && o < s.output_width; ++o) {
      y[o] = 0;
    }
    for (int64_t tree = 0; tree < s.trees; ++tree) {
      const TokenInTree t(p, token, tree);
      double* scores = static_cast<double*>(p.scores) + (token * s.trees + tree) * s.levels;
      int64_t node = 0;
      for (int level = 0; level < s.levels; ++level) {
        scores[level] = t.score(node);
        if (level < s.decisions) {
          node = t.child(node, level, scores[level]);
        }
      }
      p.leaf[token * s.trees + tree] = node + 1 - (int64_t(1) << s.decisions);
      if (y) {
        t.contribute(0, 0, y);
      }
    }
  }
}

// Walks the paths anew: the given scores and leaf are those of tree_forward.
inline void tree_backward(const TreeBackward& p) {
  const TreeForward& f = p.forward;
  const TreeShape& s = f.shape;
  const auto row = [](void* gradient, int64_t index) {
    return static_cast<double*>(gradient) + index;
  };
  for (int64_t token = 0; token < s.tokens; ++token) {
    const double* g = doubles(p.grad_output) + token * s.output_width;
    std::vector<double> grad_x(s.input_width);
    for (int64_t tree = 0; tree < s.trees; ++tree) {
      const TokenInTree t(f, token, tree);
      int64_t node = 0;
      for (int level = 0; level < s.levels; ++level) {
        const double score = t.score(node);
        const int64_t n = t.node_row(node);
        double grad =
            p.grad_scores ? doubles(p.grad_scores)[(token * s.trees + tree) * s.levels + level] : 0;
        if (f.weights.node_output) {
          const double* output = doubles(f.weights.node_output) + n * s.output_width;
          grad += dot(g, output, s.output_width) * slope_of(f.node_activation, score);
          if (p.grad_node_output) {
            add(row(p.grad_node_output, n * s.output_width), value_of(f.node_activation, score), g,
                s.output_width);
          }
        }
        if (p.straight_through && level < s.decisions) {
          std::vector<double> left(s.output_width), right(s.output_width);
          t.contribute(2 * node + 1, level + 1, left.data());
          t.contribute(2 * node + 2, level + 1, right.data());
          const double difference =
              dot(g, right.data(), s.output_width) - dot(g, left.data(), s.output_width);
          const double c = logistic(p.slope * score);
          const double steepness = p.slope * c * (1 - c);
          const int64_t i = (token * s.trees + tree) * s.levels + level;
          const double factor = p.alternates ? doubles(p.alternates)[i] : 1;
          if (factor != 0 && !(steepness <= p.min_slope * p.slope / 4)) {
            grad += difference * factor * steepness;
          }
        }
        add(grad_x.data(), grad, doubles(f.weights.node_weight) + n * s.input_width, s.input_width);
        if (p.grad_node_weight) {
          add(row(p.grad_node_weight, n * s.input_width), grad, t.x, s.input_width);
        }
        if (p.grad_node_bias) {
          *row(p.grad_node_bias, n) += grad;
        }
        if (level < s.decisions) {
          node = t.child(node, level, score);
        }
      }
      const int64_t leaf = node + 1 - (int64_t(1) << s.decisions);
      for (int64_t j = 0; j < s.leaf_width; ++j) {
        const int64_t h = t.leaf_row(leaf) * s.leaf_width + j;
        const double pre = t.pre_activation(leaf, j);
        const double grad_pre = dot(g, doubles(f.weights.w2) + h * s.output_width, s.output_width) *
                                t.leaf_scale(j) * slope_of(f.leaf_activation, pre);
        add(grad_x.data(), grad_pre, doubles(f.weights.w1) + h * s.input_width, s.input_width);
        if (p.grad_w1) {
          add(row(p.grad_w1, h * s.input_width), grad_pre, t.x, s.input_width);
        }
        if (p.grad_b1) {
          *row(p.grad_b1, h) += grad_pre;
        }
        if (p.grad_w2) {
          add(row(p.grad_w2, h * s.output_width),
              value_of(f.leaf_activation, pre) * t.leaf_scale(j), g, s.output_width);
        }
      }
      if (p.grad_b2) {
        add(row(p.grad_b2, t.leaf_row(leaf) * s.output_width), 1, g, s.output_width);
      }
    }
    if (p.grad_x) {
      std::copy(grad_x.begin(), grad_x.end(), row(p.grad_x, token * s.input_width));
    }
  }
}

// The share of its weight that the path to `leaf` keeps at `level`, and the node that decides it.
struct Share {
  int64_t node;
  bool right;
  double of(const double* logits) const { return logistic(right ? logits[node] : -logits[node]); }
};

inline Share share(int64_t leaf, int depth, int level) {
  const int64_t position = leaf >> (depth - level);
  return {(int64_t(1) << level) - 1 + position, ((leaf >> (depth - level - 1)) & 1) == 1};
}

inline void leaf_mixture(const LeafMixture& p) {
  const int64_t leaves = int64_t(1) << p.depth;
  for (int64_t token = 0; token < p.tokens; ++token) {
    const double* logits = doubles(p.node_logits) + token * (leaves - 1);
    for (int64_t leaf = 0; leaf < leaves; ++leaf) {
      double weight = 1;
      for (int level = 0; level < p.depth; ++level) {
        weight *= share(leaf, p.depth, level).of(logits);
      }
      static_cast<double*>(p.mixture)[token * leaves + leaf] = weight;
    }
  }
}

// d log(sigmoid(z)) / dz = sigmoid(-z) for every decision of every path.
inline void leaf_mixture_backward(const LeafMixture& p) {
  const int64_t leaves = int64_t(1) << p.depth;
  for (int64_t token = 0; token < p.tokens; ++token) {
    const double* logits = doubles(p.node_logits) + token * (leaves - 1);
    double* grad = static_cast<double*>(p.grad_node_logits) + token * (leaves - 1);
    std::fill_n(grad, leaves - 1, 0.0);
    for (int64_t leaf = 0; leaf < leaves; ++leaf) {
      const int64_t i = token * leaves + leaf;
      for (int level = 0; level < p.depth; ++level) {
        const Share taken = share(leaf, p.depth, level);
        const Share other = {taken.node, !taken.right};
        grad[taken.node] += (taken.right ? 1 : -1) * other.of(logits) * doubles(p.grad_mixture)[i] *
                            doubles(p.mixture)[i];
      }
    }
  }
}

inline void gated_activation(const GatedActivation& p) {
  for (int64_t i = 0; i < p.tokens * p.leaves * p.leaf_width; ++i) {
    static_cast<double*>(p.output)[i] =
        value_of(p.activation, doubles(p.pre)[i]) * doubles(p.mixture)[i / p.leaf_width];
  }
}

inline void gated_activation_backward(const GatedActivation& p) {
  double* grad_mixture = static_cast<double*>(p.grad_mixture);
  std::fill_n(grad_mixture, p.tokens * p.leaves, 0.0);
  for (int64_t i = 0; i < p.tokens * p.leaves * p.leaf_width; ++i) {
    const double pre = doubles(p.pre)[i], grad = doubles(p.grad_output)[i];
    static_cast<double*>(p.grad_pre)[i] =
        grad * doubles(p.mixture)[i / p.leaf_width] * slope_of(p.activation, pre);
    grad_mixture[i / p.leaf_width] += grad * value_of(p.activation, pre);
  }
}

// Calls f(token, leaf) for every pair of a token and a leaf.
template <typename F>
void for_pairs(const SparseLeaves& p, const F& f) {
  for (int64_t r = 0; r < p.run_count; ++r) {
    for (int64_t i = 0; i < p.runs[r].count; ++i) {
      f(p.tokens[p.runs[r].begin + i], p.runs[r].row);
    }
  }
}

// Row of leaf `leaf` in weights of `width`, or that of its neuron j.
inline int64_t row_of(const TreeShape& s, int64_t leaf, int64_t j, int64_t width) {
  return (leaf * s.leaf_width + j) * width;
}

inline double pre_activation(const SparseLeaves& p, int64_t token, int64_t leaf, int64_t j) {
  const TreeShape& s = p.shape;
  const double bias = p.weights.b1 ? doubles(p.weights.b1)[leaf * s.leaf_width + j] : 0;
  return bias + dot(doubles(p.x) + token * s.input_width,
                    doubles(p.weights.w1) + row_of(s, leaf, j, s.input_width), s.input_width);
}

inline void sparse_leaves(const SparseLeaves& p) {
  const TreeShape& s = p.shape;
  for_pairs(p, [&](int64_t token, int64_t leaf) {
    const double weight = doubles(p.mixture)[token * p.leaves + leaf];
    double* y = static_cast<double*>(p.output) + token * s.output_width;
    for (int64_t j = 0; j < s.leaf_width; ++j) {
      add(y, weight * value_of(p.activation, pre_activation(p, token, leaf, j)),
          doubles(p.weights.w2) + row_of(s, leaf, j, s.output_width), s.output_width);
    }
    if (p.weights.b2) {
      add(y, weight, doubles(p.weights.b2) + leaf * s.output_width, s.output_width);
    }
  });
}

inline void sparse_leaves_backward(const SparseLeaves& p) {
  const TreeShape& s = p.shape;
  const auto row = [](void* base, int64_t offset) { return static_cast<double*>(base) + offset; };
  for_pairs(p, [&](int64_t token, int64_t leaf) {
    const double weight = doubles(p.mixture)[token * p.leaves + leaf];
    const double* g = doubles(p.grad_output) + token * s.output_width;
    double* grad_weight = row(p.grad_mixture, token * p.leaves + leaf);
    for (int64_t j = 0; j < s.leaf_width; ++j) {
      const int64_t in = row_of(s, leaf, j, s.input_width);
      const int64_t out = row_of(s, leaf, j, s.output_width);
      const double pre = pre_activation(p, token, leaf, j);
      const double value = value_of(p.activation, pre);
      const double down = dot(g, doubles(p.weights.w2) + out, s.output_width);
      const double grad_pre = down * weight * slope_of(p.activation, pre);
      *grad_weight += down * value;
      if (p.grad_x) {
        add(row(p.grad_x, token * s.input_width), grad_pre, doubles(p.weights.w1) + in,
            s.input_width);
      }
      if (p.grad_w1) {
        add(row(p.grad_w1, in), grad_pre, doubles(p.x) + token * s.input_width, s.input_width);
      }
      if (p.grad_b1) {
        *row(p.grad_b1, leaf * s.leaf_width + j) += grad_pre;
      }
      if (p.grad_w2) {
        add(row(p.grad_w2, out), weight * value, g, s.output_width);
      }
    }
    if (p.weights.b2) {
      const int64_t out = leaf * s.output_width;
      *grad_weight += dot(g, doubles(p.weights.b2) + out, s.output_width);
      if (p.grad_b2) {
        add(row(p.grad_b2, out), weight, g, s.output_width);
      }
    }
  });
}

inline void sparse_linear_backward(const SparseLinearBackward& p) {
  for (int64_t token = 0; token < p.tokens; ++token) {
    std::vector<double> grad_x(p.width);
    for (int64_t row = 0; row < p.rows; ++row) {
      const double g = doubles(p.grad_output)[token * p.rows + row];
      add(grad_x.data(), g, doubles(p.weight) + row * p.width, p.width);
      if (p.grad_weight) {
        add(static_cast<double*>(p.grad_weight) + row * p.width, g, doubles(p.x) + token * p.width,
            p.width);
      }
    }
    if (p.grad_x) {
      std::copy(grad_x.begin(), grad_x.end(), static_cast<double*>(p.grad_x) + token * p.width);
    }
  }
}

// Stands in for a kernel table; float64 only.
inline cpu::Kernels table() {
  return {
      tree_forward,           tree_backward,
      leaf_mixture,           leaf_mixture_backward,
      gated_activation,       gated_activation_backward,
      /*path_gates=*/nullptr, /*path_gates_backward=*/nullptr,  // tree_forward is the same function
      sparse_leaves,          sparse_leaves_backward,
      sparse_linear_backward};
}

}  // namespace fff::reference
