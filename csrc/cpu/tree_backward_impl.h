// Hard tree, backward, one tree after the other, tokens in leaf order:
//   1. per token: the gradients of its gates (scores and hidden activations), and from them that of
//   x;
//   2. per weight row: the sum over its tokens of gate gradient x vector, columns split over
//   threads.
// No atomics, and every sum has one order whatever the number of threads.
#pragma once

#include <ATen/Parallel.h>

#include "../decision.h"
#include "gradient_rows.h"
#include "straight_through.h"

namespace fff::cpu {
inline namespace CPU_CAPABILITY {

template <typename T>
class TreeBackwardPass {
  using A = acc_t<T>;

 public:
  TreeBackwardPass(const TreeBackward& p, int64_t tree)
      : p_(p),
        s_(p.forward.shape),
        tree_index_(tree),
        tree_(s_, p.forward.weights, tree),
        order_(s_, p.leaf, tree),
        rows_(p, tree, order_),
        x_(static_cast<const T*>(p.forward.x)),
        grad_output_(static_cast<const T*>(p.grad_output)),
        has_score_grad_(p.straight_through || tree_.node_output || p.grad_scores),
        grad_score_(s_.tokens * s_.levels),
        node_gate_(tree_.node_output ? s_.tokens * s_.levels : 0),
        grad_hidden_(s_.tokens * s_.leaf_width),
        hidden_(s_.tokens * s_.leaf_width) {}

  void run() {
    if (p_.straight_through) {
      decision_slopes();
      others_ = alternate_contributions<T>(p_, tree_index_, order_, slopes_);
    }
    at::parallel_for(
        0, static_cast<int64_t>(order_.runs.size()), 4, [&](int64_t begin, int64_t end) {
          Tile tile(s_);
          for (int64_t r = begin; r < end; ++r) {
            const Run& run = order_.runs[r];
            for (int64_t i = 0; i < run.count; i += kTokenTile) {
              tile.leaf = run.leaf;
              tile.at = run.begin + i;
              tile.count = static_cast<int>(std::min<int64_t>(kTokenTile, run.count - i));
              token_gradients(tile);
            }
          }
          stream_fence();
        });
    weight_gradients();
    bias_gradients();
  }

 private:
  // Up to kTokenTile tokens of one leaf, and room for what is computed of them.
  struct Tile {
    int64_t leaf = 0;
    int64_t at = 0;  // first of them in leaf order
    int count = 0;
    std::vector<A> node_dots;  // [levels, kTokenTile] <grad_output, node_output>
    std::vector<A> pre;        // [leaf_width, kTokenTile]
    std::vector<A> slopes;     // [leaf_width, kTokenTile], or [levels] of one token
    std::vector<A> leaf_dots;  // [leaf_width, kTokenTile] <grad_output, w2>
    A leaf_value[kTokenTile];  // <grad_output, what the leaf network contributes>
    std::vector<const T*> rows;
    std::vector<A> coefficients;

    explicit Tile(const TreeShape& s)
        : node_dots(s.levels * kTokenTile),
          pre(s.leaf_width * kTokenTile),
          slopes(std::max<int64_t>(s.leaf_width * kTokenTile, s.levels)),
          leaf_dots(s.leaf_width * kTokenTile),
          rows(s.levels + s.leaf_width),
          coefficients((s.levels + s.leaf_width) * kTokenTile) {}
  };

  void decision_slopes() {
    slopes_.resize(s_.tokens * s_.levels);
    at::parallel_for(0, s_.tokens, 512, [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at) {
        const int64_t path = (order_.tokens[at] * s_.trees + tree_index_) * s_.levels;
        const A* scores = static_cast<const A*>(p_.scores) + path;
        for (int level = 0; level < s_.decisions; ++level) {
          slopes_[at * s_.levels + level] = decision_slope(p_, scores[level], path + level);
        }
      }
    });
  }

  static A (*as_tile(std::vector<A>& v))
      [kTokenTile] { return reinterpret_cast<A(*)[kTokenTile]>(v.data()); }

  void token_gradients(Tile& tile) {
    if (tree_.node_output) {
      const T* gs[kTokenTile];
      for (int t = 0; t < tile.count; ++t) {
        gs[t] = grad_output_ + order_.tokens[tile.at + t] * s_.output_width;
      }
      for (int level = 0; level < s_.levels; ++level) {
        tile.rows[level] = tree_.node_output + s_.node_on_path(tile.leaf, level) * s_.output_width;
      }
      dots_rows(tile.rows.data(), s_.levels, gs, tile.count, s_.output_width,
                as_tile(tile.node_dots));
    }
    std::fill_n(tile.leaf_value, tile.count, A(0));
    if (s_.leaf_width > 0) {
      hidden_gradients(tile);
    }
    if (has_score_grad_) {
      for (int t = 0; t < tile.count; ++t) {
        score_gradients(tile, t);
      }
    }
    if (p_.grad_x) {
      input_gradients(tile);
    }
  }

  void hidden_gradients(Tile& tile) {
    const int64_t* tokens = order_.tokens.data() + tile.at;
    auto* pre = as_tile(tile.pre);
    auto* dots = as_tile(tile.leaf_dots);
    leaf_pre_activations(tree_, s_, tile.leaf, x_, tokens, tile.count, pre);
    leaf_dots(tree_.w2, s_, tile.leaf, grad_output_, tokens, tile.count, s_.output_width, dots);
    if (p_.straight_through) {
      leaf_bias_dots(tree_, s_, tile.leaf, grad_output_, tokens, tile.count, tile.leaf_value);
    }
    activate_all(p_.forward.leaf_activation, pre[0], s_.leaf_width * kTokenTile, pre[0],
                 tile.slopes.data());
    auto* slopes = as_tile(tile.slopes);
    for (int t = 0; t < tile.count; ++t) {
      const A* scale = leaf_scale_of<A>(p_.forward, tokens[t], tree_index_);
      A* hidden = hidden_.data() + (tile.at + t) * s_.leaf_width;
      A* grad_hidden = grad_hidden_.data() + (tile.at + t) * s_.leaf_width;
      for (int64_t j = 0; j < s_.leaf_width; ++j) {
        const A factor = scale ? scale[j] : A(1);
        hidden[j] = pre[j][t] * factor;
        grad_hidden[j] = dots[j][t] * factor * slopes[j][t];
        tile.leaf_value[t] += hidden[j] * dots[j][t];
      }
    }
  }

  // From the leaf up, so that the contribution of the subtree on the taken side is at hand at each
  // decision.
  void score_gradients(Tile& tile, int t) {
    const int64_t at = tile.at + t;
    const int64_t token = order_.tokens[at];
    const int64_t offset = (token * s_.trees + tree_index_) * s_.levels;
    const A* scores = static_cast<const A*>(p_.scores) + offset;
    const A* grad_scores = static_cast<const A*>(p_.grad_scores);
    auto* node_dots = as_tile(tile.node_dots);
    A* gates = node_gate_.data() + at * s_.levels;
    if (tree_.node_output) {
      activate_all(p_.forward.node_activation, scores, s_.levels, gates, tile.slopes.data());
    }
    A taken = tile.leaf_value[t];
    for (int level = s_.levels - 1; level >= 0; --level) {
      A grad = grad_scores ? grad_scores[offset + level] : A(0);
      const A slope = p_.straight_through ? slopes_[at * s_.levels + level] : A(0);
      if (slope != A(0)) {
        const A other = others_[at * s_.levels + level];
        grad += slope * (s_.turns_right(tile.leaf, level) ? taken - other : other - taken);
      }
      if (tree_.node_output) {
        grad += node_dots[level][t] * tile.slopes[level];
        taken += gates[level] * node_dots[level][t];
      }
      grad_score_[at * s_.levels + level] = grad;
    }
  }

  void input_gradients(Tile& tile) {
    int64_t count = 0;
    if (has_score_grad_) {
      for (int level = 0; level < s_.levels; ++level) {
        tile.rows[count++] = tree_.node_weight + s_.node_on_path(tile.leaf, level) * s_.input_width;
      }
    }
    for (int64_t j = 0; j < s_.leaf_width; ++j) {
      tile.rows[count++] = tree_.w1 + s_.neuron_of_leaf(tile.leaf, j) * s_.input_width;
    }
    A* c = tile.coefficients.data();
    for (int t = 0; t < tile.count; ++t) {
      const int64_t at = tile.at + t;
      if (has_score_grad_) {
        c = std::copy_n(grad_score_.data() + at * s_.levels, s_.levels, c);
      }
      c = std::copy_n(grad_hidden_.data() + at * s_.leaf_width, s_.leaf_width, c);
    }
    if (p_.grad_x_dtype == p_.forward.dtype) {
      write_input_gradients(static_cast<T*>(p_.grad_x), tile, count);
    } else {
      write_input_gradients(static_cast<A*>(p_.grad_x), tile, count);
    }
  }

  template <typename O>
  void write_input_gradients(O* grad_x, const Tile& tile, int64_t row_count) const {
    O* ys[kTokenTile];
    for (int t = 0; t < tile.count; ++t) {
      ys[t] = grad_x + order_.tokens[tile.at + t] * s_.input_width;
    }
    combine(tile.rows.data(), tile.coefficients.data(), row_count, row_count, ys, tile.count,
            s_.input_width, write_mode(grad_x, s_, s_.input_width, tree_index_));
  }

  // Rows of one side (those that multiply x, or those that multiply grad_output), columns [begin,
  // end).
  void add_rows(const T* vectors, int64_t width, A* grad_nodes, const std::vector<A>& node_gates,
                A* grad_leaves, const std::vector<A>& leaf_gates, A* grad_leaf_bias, int64_t begin,
                int64_t end) const {
    const std::vector<A> ones(LeafOrder::kRunTokens, A(1));
    std::vector<A*> rows(std::max<int64_t>(s_.levels, s_.leaf_width));
    const T* xs[LeafOrder::kRunTokens];
    for (size_t r = 0; r < order_.runs.size(); ++r) {
      const Run& run = order_.runs[r];
      for (int64_t t = 0; t < run.count; ++t) {
        xs[t] = vectors + order_.tokens[run.begin + t] * width;
      }
      if (grad_nodes) {
        for (int level = 0; level < s_.levels; ++level) {
          rows[level] = grad_nodes + rows_.nodes(r)[level] * width;
        }
        outer(rows.data(), node_gates.data() + run.begin * s_.levels, s_.levels, s_.levels, xs,
              run.count, begin, end);
      }
      if (grad_leaves) {
        for (int64_t j = 0; j < s_.leaf_width; ++j) {
          rows[j] = grad_leaves + s_.neuron_of_leaf(rows_.leaf(r), j) * width;
        }
        outer(rows.data(), leaf_gates.data() + run.begin * s_.leaf_width, s_.leaf_width,
              s_.leaf_width, xs, run.count, begin, end);
      }
      if (grad_leaf_bias) {
        A* row = grad_leaf_bias + rows_.leaf(r) * width;
        outer(&row, ones.data(), 1, 1, xs, run.count, begin, end);
      }
    }
  }

  void weight_gradients() {
    A* node_weight = has_score_grad_ ? static_cast<A*>(p_.grad_node_weight) : nullptr;
    A* w1 = static_cast<A*>(p_.grad_w1);
    A* node_output = static_cast<A*>(p_.grad_node_output);
    A* w2 = static_cast<A*>(p_.grad_w2);
    A* b2 = static_cast<A*>(p_.grad_b2);
    const int64_t input_columns = node_weight || w1 ? s_.input_width : 0;
    const int64_t output_columns = node_output || w2 || b2 ? s_.output_width : 0;
    // Both sides' columns as one range of blocks, each a few cache lines wide.
    constexpr int64_t block = 64;
    const int64_t input_blocks = (input_columns + block - 1) / block;
    const int64_t output_blocks = (output_columns + block - 1) / block;
    at::parallel_for(0, input_blocks + output_blocks, 1, [&](int64_t begin, int64_t end) {
      if (begin < input_blocks) {
        add_rows(x_, s_.input_width, node_weight, grad_score_, w1, grad_hidden_, nullptr,
                 begin * block, std::min(std::min(end, input_blocks) * block, input_columns));
      }
      if (end > input_blocks) {
        add_rows(grad_output_, s_.output_width, node_output, node_gate_, w2, hidden_, b2,
                 (std::max(begin, input_blocks) - input_blocks) * block,
                 std::min((end - input_blocks) * block, output_columns));
      }
    });
  }

  void bias_gradients() {
    A* node_bias = has_score_grad_ ? static_cast<A*>(p_.grad_node_bias) : nullptr;
    A* b1 = static_cast<A*>(p_.grad_b1);
    for (size_t r = 0; r < order_.runs.size(); ++r) {
      const Run& run = order_.runs[r];
      for (int64_t at = run.begin; at < run.begin + run.count; ++at) {
        for (int level = 0; node_bias && level < s_.levels; ++level) {
          node_bias[rows_.nodes(r)[level]] += grad_score_[at * s_.levels + level];
        }
        for (int64_t j = 0; b1 && j < s_.leaf_width; ++j) {
          b1[s_.neuron_of_leaf(rows_.leaf(r), j)] += grad_hidden_[at * s_.leaf_width + j];
        }
      }
    }
  }

  const TreeBackward& p_;
  const TreeShape& s_;
  const int64_t tree_index_;
  const Tree<T> tree_;
  const LeafOrder order_;
  const GradientRows rows_;
  const T* x_;
  const T* grad_output_;
  const bool has_score_grad_;
  // All in leaf order.
  std::vector<A> grad_score_;   // [tokens, levels]
  std::vector<A> node_gate_;    // [tokens, levels] activation(score)
  std::vector<A> grad_hidden_;  // [tokens, leaf_width] of the pre-activations
  std::vector<A> hidden_;       // [tokens, leaf_width]
  std::vector<A> slopes_;       // [tokens, levels] decision_slope
  std::vector<A> others_;       // [tokens, levels] see Alternates
};

inline void tree_backward(const TreeBackward& p) {
  dispatch(p.forward.dtype, [&](auto zero) {
    for (int64_t tree = 0; tree < p.forward.shape.trees; ++tree) {
      TreeBackwardPass<decltype(zero)>(p, tree).run();
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace fff::cpu
