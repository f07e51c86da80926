// Leaf networks for some pairs of a token and a leaf, in runs of pairs that share the leaf:
//   1. per run: the hidden activations of its tokens (backward: and their gradients);
//   2. run after run, columns split over threads: rows of tokens gather from rows of leaves (output
//   and gradient of x), rows of leaves from rows of tokens (gradients of weights).
// No atomics, and every sum has one order whatever the number of threads. An output bias is the
// output row of one more neuron, whose activation is 1.
#pragma once

#include <ATen/Parallel.h>

#include "leaf_network.h"

namespace fff::cpu {
inline namespace CPU_CAPABILITY {

template <typename T>
class SparseLeavesPass {
  using A = acc_t<T>;

 public:
  explicit SparseLeavesPass(const SparseLeaves& p)
      : p_(p),
        s_(p.shape),
        tree_(s_, p.weights, 0),
        x_(static_cast<const T*>(p.x)),
        mixture_(static_cast<const T*>(p.mixture)),
        grad_output_(static_cast<const T*>(p.grad_output)),
        hidden_width_(s_.leaf_width + (tree_.b2 ? 1 : 0)) {}

  void forward() {
    by_neuron_.resize(p_.pair_count * hidden_width_);
    for_tiles([&](Tile& tile) {
      leaf_pre_activations(tree_, s_, tile.leaf, x_, tile.tokens, tile.count, as_tile(tile.pre));
      activate_all(p_.activation, tile.pre.data(), s_.leaf_width * kTokenTile, tile.pre.data());
      for (int t = 0; t < tile.count; ++t) {
        const A weight = static_cast<A>(mixture_[mixture_index(tile, t)]);
        A* hidden = by_neuron_.data() + tile.run->begin * hidden_width_ + tile.in_run + t;
        for (int64_t j = 0; j < s_.leaf_width; ++j) {
          hidden[j * tile.run->count] = as_tile(tile.pre)[j][t] * weight;
        }
        if (tree_.b2) {
          hidden[s_.leaf_width * tile.run->count] = weight;
        }
      }
    });
    for_columns(
        s_.output_width, 0,
        [&](int64_t begin, int64_t end) {
          add_to_tokens(hidden_width_, tree_.w2, tree_.b2, p_.output, s_.output_width, begin, end);
        },
        [](int64_t, int64_t) {});
  }

  void backward() {
    by_neuron_.resize(p_.pair_count * s_.leaf_width);
    by_pair_.resize(p_.pair_count * s_.leaf_width);
    hidden_.resize(p_.pair_count * hidden_width_);
    for_tiles([&](Tile& tile) { gate_gradients(tile); });
    for_columns(
        p_.grad_x || p_.grad_w1 ? s_.input_width : 0, p_.grad_w2 ? s_.output_width : 0,
        [&](int64_t begin, int64_t end) {
          if (p_.grad_x) {
            add_to_tokens(s_.leaf_width, tree_.w1, nullptr, p_.grad_x, s_.input_width, begin, end);
          }
          if (p_.grad_w1) {
            sum_to_leaves(by_pair_, s_.leaf_width, x_, p_.grad_w1, nullptr, s_.input_width, begin,
                          end);
          }
        },
        [&](int64_t begin, int64_t end) {
          sum_to_leaves(hidden_, hidden_width_, grad_output_, p_.grad_w2, p_.grad_b2,
                        s_.output_width, begin, end);
        });
    if (p_.grad_b1) {
      sum_to_input_biases();
    }
  }

 private:
  // Up to kTokenTile pairs of one run, and room for what is computed of them.
  struct Tile {
    const RowRun* run = nullptr;
    int64_t in_run = 0;  // first of them in the run
    int64_t leaf = 0;
    const int64_t* tokens = nullptr;
    int count = 0;
    std::vector<A> pre, slopes, dots;  // [leaf_width, kTokenTile]

    explicit Tile(const TreeShape& s)
        : pre(s.leaf_width * kTokenTile),
          slopes(s.leaf_width * kTokenTile),
          dots(s.leaf_width * kTokenTile) {}
  };

  static A (*as_tile(std::vector<A>& v))
      [kTokenTile] { return reinterpret_cast<A(*)[kTokenTile]>(v.data()); }

  int64_t mixture_index(const Tile& tile, int t) const {
    return tile.tokens[t] * p_.leaves + tile.leaf;
  }

  template <typename F>
  void for_tiles(const F& f) const {
    at::parallel_for(0, p_.run_count, 4, [&](int64_t begin, int64_t end) {
      Tile tile(s_);
      for (int64_t r = begin; r < end; ++r) {
        tile.run = p_.runs + r;
        tile.leaf = tile.run->row;
        for (int64_t i = 0; i < tile.run->count; i += kTokenTile) {
          tile.in_run = i;
          tile.tokens = p_.tokens + tile.run->begin + i;
          tile.count = static_cast<int>(std::min<int64_t>(kTokenTile, tile.run->count - i));
          f(tile);
        }
      }
    });
  }

  void gate_gradients(Tile& tile) {
    auto* value = as_tile(tile.pre);
    auto* slopes = as_tile(tile.slopes);
    auto* dots = as_tile(tile.dots);
    A grad_weight[kTokenTile];
    leaf_pre_activations(tree_, s_, tile.leaf, x_, tile.tokens, tile.count, value);
    leaf_dots(tree_.w2, s_, tile.leaf, grad_output_, tile.tokens, tile.count, s_.output_width,
              dots);
    leaf_bias_dots(tree_, s_, tile.leaf, grad_output_, tile.tokens, tile.count, grad_weight);
    activate_all(p_.activation, value[0], s_.leaf_width * kTokenTile, value[0], slopes[0]);
    for (int t = 0; t < tile.count; ++t) {
      const A weight = static_cast<A>(mixture_[mixture_index(tile, t)]);
      const int64_t pair = tile.run->begin + tile.in_run + t;
      A* hidden = hidden_.data() + pair * hidden_width_;
      A* by_pair = by_pair_.data() + pair * s_.leaf_width;
      A* by_neuron = by_neuron_.data() + tile.run->begin * s_.leaf_width + tile.in_run + t;
      for (int64_t j = 0; j < s_.leaf_width; ++j) {
        hidden[j] = value[j][t] * weight;
        by_pair[j] = by_neuron[j * tile.run->count] = dots[j][t] * weight * slopes[j][t];
        grad_weight[t] += value[j][t] * dots[j][t];
      }
      if (tree_.b2) {
        hidden[s_.leaf_width] = weight;
      }
      static_cast<T*>(p_.grad_mixture)[mixture_index(tile, t)] = static_cast<T>(grad_weight[t]);
    }
  }

  // Both sides' columns as one range of blocks, each a few cache lines wide.
  template <typename Input, typename Output>
  static void for_columns(int64_t input_columns, int64_t output_columns, const Input& input,
                          const Output& output) {
    constexpr int64_t block = 64;
    const int64_t input_blocks = (input_columns + block - 1) / block;
    const int64_t output_blocks = (output_columns + block - 1) / block;
    at::parallel_for(0, input_blocks + output_blocks, 1, [&](int64_t begin, int64_t end) {
      if (begin < input_blocks) {
        input(begin * block, std::min(std::min(end, input_blocks) * block, input_columns));
      }
      if (end > input_blocks) {
        output((std::max(begin, input_blocks) - input_blocks) * block,
               std::min((end - input_blocks) * block, output_columns));
      }
    });
  }

  // sums[token] += by_neuron_ * rows of the leaves, in columns [begin, end)
  void add_to_tokens(int64_t gates, const T* weight, const T* bias, void* sums, int64_t width,
                     int64_t begin, int64_t end) const {
    A* rows[RowRun::kMostPairs];
    std::vector<const T*> xs(gates);
    for (const RowRun* run = p_.runs; run < p_.runs + p_.run_count; ++run) {
      for (int64_t t = 0; t < run->count; ++t) {
        rows[t] = static_cast<A*>(sums) + p_.tokens[run->begin + t] * width;
      }
      for (int64_t j = 0; j < s_.leaf_width; ++j) {
        xs[j] = weight + s_.neuron_of_leaf(run->row, j) * width;
      }
      if (bias) {
        xs[s_.leaf_width] = bias + run->row * width;
      }
      outer(rows, by_neuron_.data() + run->begin * gates, run->count, run->count, xs.data(), gates,
            begin, end);
    }
  }

  // Gradients of the leaves' rows = sums of coefficients * vectors[token], in columns [begin, end)
  void sum_to_leaves(const std::vector<A>& coefficients, int64_t gates, const T* vectors,
                     void* grad_weight, void* grad_bias, int64_t width, int64_t begin,
                     int64_t end) const {
    std::vector<A*> rows(gates);
    const auto find_rows = [&](int64_t leaf) {
      for (int64_t j = 0; j < s_.leaf_width; ++j) {
        rows[j] = static_cast<A*>(grad_weight) + s_.neuron_of_leaf(leaf, j) * width;
      }
      if (grad_bias) {
        rows[s_.leaf_width] = static_cast<A*>(grad_bias) + leaf * width;
      }
    };
    const auto clear_rows = [&] {
      for (A* row : rows) {
        std::fill(row + begin, row + end, A(0));
      }
    };
    // Rows are cleared right before they are first added to, while they are in the cache.
    std::vector<bool> cleared(p_.leaves);
    const T* xs[RowRun::kMostPairs];
    for (const RowRun* run = p_.runs; run < p_.runs + p_.run_count; ++run) {
      for (int64_t t = 0; t < run->count; ++t) {
        xs[t] = vectors + p_.tokens[run->begin + t] * width;
      }
      find_rows(run->row);
      if (!cleared[run->row]) {
        clear_rows();
        cleared[run->row] = true;
      }
      outer(rows.data(), coefficients.data() + run->begin * gates, gates, gates, xs, run->count,
            begin, end);
    }
    for (int64_t leaf = 0; leaf < p_.leaves; ++leaf) {
      if (!cleared[leaf]) {
        find_rows(leaf);
        clear_rows();
      }
    }
  }

  void sum_to_input_biases() const {
    A* sums = static_cast<A*>(p_.grad_b1);
    std::fill_n(sums, p_.leaves * s_.leaf_width, A(0));
    for (const RowRun* run = p_.runs; run < p_.runs + p_.run_count; ++run) {
      const A* grads = by_pair_.data() + run->begin * s_.leaf_width;
      for (int64_t i = 0; i < run->count * s_.leaf_width; ++i) {
        sums[s_.neuron_of_leaf(run->row, i % s_.leaf_width)] += grads[i];
      }
    }
  }

  const SparseLeaves& p_;
  const TreeShape& s_;
  const Tree<T> tree_;
  const T* x_;
  const T* mixture_;
  const T* grad_output_;
  const int64_t hidden_width_;  // neurons of a leaf, the bias included
  std::vector<A> hidden_;       // [pairs, hidden_width]: activation times the leaf's weight
  std::vector<A> by_pair_;      // [pairs, leaf_width]: gradients of the pre-activations
  // For each run [neurons, pairs of the run]: the activations, in backward those gradients.
  std::vector<A> by_neuron_;
};

inline void sparse_leaves(const SparseLeaves& p) {
  dispatch(p.dtype, [&](auto zero) { SparseLeavesPass<decltype(zero)>(p).forward(); });
}

inline void sparse_leaves_backward(const SparseLeaves& p) {
  dispatch(p.dtype, [&](auto zero) { SparseLeavesPass<decltype(zero)>(p).backward(); });
}

}  // namespace CPU_CAPABILITY
}  // namespace fff::cpu
