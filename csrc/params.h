// What a kernel is told: plain structs of sizes and raw pointers, shared by CPU and CUDA, free of
// torch.
//
// `void` pointers hold elements of `dtype`; pointers marked acc hold float, or double when dtype is
// double. Every array is contiguous. Absent optional arrays are null.
#pragma once

#include <cstdint>

#include "activation.h"

namespace fff {

enum class DType : int { kFloat, kDouble, kBFloat16, kHalf };

// K trees of `levels` levels of nodes, 2^levels - 1 nodes each in heap order; leaf networks below
// them or none.
struct TreeShape {
  int64_t tokens;
  int64_t input_width;
  int64_t output_width;
  int64_t trees;
  int64_t leaf_width;  // 0 without leaf networks
  int levels;          // levels of nodes that are scored
  int decisions;       // levels that route: `levels`, or one fewer when nothing lies below the last
                       // level

  FFF_HOST_DEVICE int64_t nodes() const { return (int64_t(1) << levels) - 1; }
  FFF_HOST_DEVICE int64_t leaves() const { return int64_t(1) << decisions; }
  // Heap index of the node that a path to `leaf` visits at `level`.
  FFF_HOST_DEVICE int64_t node_on_path(int64_t leaf, int level) const {
    return (int64_t(1) << level) - 1 + (leaf >> (decisions - level));
  }
  // Row of a leaf's hidden neuron, and of its output weights, among all leaves'.
  FFF_HOST_DEVICE int64_t neuron_of_leaf(int64_t leaf, int64_t j) const {
    return leaf * leaf_width + j;
  }
  // A leaf of the tree, whatever value a caller may pass.
  FFF_HOST_DEVICE int64_t inside(int64_t leaf) const { return leaf & (leaves() - 1); }
  // Whether the path to `leaf` turns right at `level` (< decisions).
  FFF_HOST_DEVICE bool turns_right(int64_t leaf, int level) const {
    return (leaf >> (decisions - 1 - level)) & 1;
  }
};

struct TreeWeights {
  const void* node_weight;  // [trees, nodes, input_width]
  const void* node_bias;    // [trees, nodes]
  const void* node_output;  // [trees, nodes, output_width]
  const void* w1;           // [trees, leaves, leaf_width, input_width]
  const void* b1;           // [trees, leaves, leaf_width]
  const void* w2;           // [trees, leaves, leaf_width, output_width]
  const void* b2;           // [trees, leaves, output_width]
};

struct TreeForward {
  TreeShape shape;
  DType dtype;
  bool tie_right;
  Activation node_activation;
  Activation leaf_activation;
  TreeWeights weights;
  const void* x;           // [tokens, input_width]
  const void* noise;       // acc [tokens, trees, levels]
  const void* leaf_scale;  // acc [tokens, trees, leaf_width]
  // outputs
  void* output;  // [tokens, output_width] of output_dtype; null when only the routes are wanted
  DType output_dtype;  // dtype, or the accumulation type where several trees add up
  void* scores;        // acc [tokens, trees, levels]
  int64_t* leaf;       // [tokens, trees]
  // Whether products of floats may round their factors to tf32; CUDA alone asks.
  bool allow_tf32 = false;
};

// The rows that an array has: those with the given ids, ascending; null: all of them.
struct RowIds {
  const int64_t* ids;
  int64_t count;
};

struct TreeBackward {
  TreeForward forward;      // its x, weights and settings; `output` is unused
  const void* grad_output;  // [tokens, output_width]
  const void* grad_scores;  // acc [tokens, trees, levels]
  const void* scores;       // acc [tokens, trees, levels]
  const int64_t* leaf;      // [tokens, trees]
  bool straight_through;
  double slope;
  double min_slope;        // decisions whose slope is at most this share of its maximum have none
  const void* alternates;  // acc [tokens, trees, levels] factors of straight-through gradients
  // Rows of the gradients of weights, of all trees; on CUDA all of them. Ids that are given contain
  // those of every path.
  RowIds nodes;
  RowIds leaves;
  // outputs, each null when not wanted
  void* grad_x;        // [tokens, input_width] of grad_x_dtype
  DType grad_x_dtype;  // dtype, or the accumulation type where several trees add up
  // Shaped as the weights but for the number of rows. The CPU adds to them, in the accumulation
  // type; CUDA writes them whole, in dtype, except those of nodes whose scores have none.
  DType grad_weights_dtype;
  void* grad_node_weight;
  void* grad_node_bias;
  void* grad_node_output;
  void* grad_w1;
  void* grad_b1;
  void* grad_w2;
  void* grad_b2;

  FFF_HOST_DEVICE bool scores_have_gradients() const {
    return straight_through || grad_scores || forward.weights.node_output;
  }
};

// The paths of a forest of neuron trees that were all scored; not float64, and on the CPU float32.
struct PathGates {
  // Its outputs are those of `forward` but for `output`, in the forward pass; in the backward pass
  // it has none. Straight-through routing is for CUDA alone.
  TreeBackward tree;
  const float* all_scores;  // [tokens, trees, nodes]; in the backward pass if straight_through
  const void* bias;         // [trees, nodes] that all_scores lack, or null; CUDA alone
  // [tokens, trees, nodes], 0 off the paths; written by both passes, on CUDA unless null
  void* gates;
  // backward
  const float* grad_gates;  // [tokens, trees, nodes]
  void* grad_all_scores;    // [tokens, trees, nodes]
};

struct LeafMixture {
  int64_t tokens;
  int depth;
  DType dtype;
  const void* node_logits;  // [tokens, 2^depth - 1]
  // forward
  void* mixture;  // [tokens, 2^depth]; an input of the backward pass
  // backward
  const void* grad_mixture;  // [tokens, 2^depth]
  void* grad_node_logits;    // [tokens, 2^depth - 1]
};

struct GatedActivation {
  int64_t tokens;
  int64_t leaves;
  int64_t leaf_width;
  DType dtype;
  Activation activation;
  const void* pre;      // [tokens, leaves, leaf_width]
  const void* mixture;  // [tokens, leaves]
  // forward
  void* output;  // [tokens, leaves, leaf_width]
  // backward
  const void* grad_output;  // [tokens, leaves, leaf_width]
  void* grad_pre;           // [tokens, leaves, leaf_width]
  void* grad_mixture;       // [tokens, leaves]
};

// Consecutive pairs of a token and a row of weights (a leaf, a node) that all have the same row.
struct RowRun {
  int64_t row;
  int64_t begin;
  int64_t count;

  static constexpr int64_t kMostPairs = 64;
};

// The leaf networks of soft trees, for some pairs of a token and a leaf only. Leaves are numbered
// over all trees.
struct SparseLeaves {
  TreeShape shape;  // without its levels
  DType dtype;
  Activation activation;
  TreeWeights weights;    // without those of the nodes
  const void* x;          // [tokens, input_width]
  const void* mixture;    // [tokens, trees, leaves]
  int64_t leaves;         // of all trees
  const int64_t* tokens;  // [pairs] the token of each, in the order of runs
  const RowRun* runs;     // [run_count]
  int64_t run_count;
  int64_t pair_count;
  // forward
  void* output;  // acc [tokens, output_width]; comes zeroed
  // backward; gradients are null when not wanted
  const void* grad_output;  // [tokens, output_width]
  void* grad_x;             // acc [tokens, input_width]; comes zeroed
  void* grad_mixture;       // [tokens, trees, leaves]; comes zeroed
  void* grad_w1;            // acc, shaped as the weights
  void* grad_b1;
  void* grad_w2;
  void* grad_b2;
};

// The gradients of a linear layer whose output's gradient is zero but for some pairs of a token and
// a row.
struct SparseLinearBackward {
  int64_t tokens;
  int64_t rows;
  int64_t width;
  DType dtype;
  const void* grad_output;     // [tokens, rows]
  const void* x;               // [tokens, width]
  const void* weight;          // [rows, width]
  const int64_t* pair_tokens;  // [pairs] the token of each, in the order of runs
  const RowRun* runs;          // [run_count]
  int64_t run_count;
  // outputs, each null when not wanted
  void* grad_x;       // [tokens, width]
  void* grad_weight;  // acc [rows, width]; comes zeroed
};

}  // namespace fff
