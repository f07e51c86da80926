// Fast feedforward trees as functions of tensors: torch_fff.functional for C++.
//
// Shapes, for K trees of n = 2^levels - 1 nodes in heap order (children of i: 2i + 1 left, 2i + 2
// right) and 2^levels leaves, one tree after the other:
//
//   x            [..., in]            tokens, with any leading dimensions
//   node_weight  [K * n, in]          one hyperplane per node
//   node_bias    [K * n]              optional
//   node_output  [K * n, out]         optional: output rows of nodes that are neurons as well
//   w1           [K * leaves, l, in]  leaf networks, x -> act(x w1^T + b1) w2 + b2
//   b1           [K * leaves, l]      optional
//   w2           [K * leaves, l, out]
//   b2           [K * leaves, out]    optional
//
// With leaf networks a token is routed through `levels` >= 0 nodes to a leaf. Without it is a tree
// of neurons: nodes have outputs, and the decision of the last level routes nothing. Outputs of the
// K trees add up. Optional tensors are absent when undefined.
//
// x and all weights share one device and one dtype: float32, float64, bfloat16 or float16,
// accumulated in float32 (float64 for float64). Activations are "relu", "gelu" (erf), "gelu_tanh",
// "silu" and "identity".
//
// All calls go through the dispatcher: autograd and autocast apply. A wrong shape, dtype, device or
// activation is a c10::Error that names the function, the argument, what was expected and what was
// given.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <tuple>

#define TORCH_FFF_API __attribute__((visibility("default")))

namespace torch_fff {

struct TreeWeights {
  at::Tensor node_weight;
  at::Tensor node_bias = {}, node_output = {};
  at::Tensor w1 = {}, b1 = {}, w2 = {}, b2 = {};
};

struct TreeOptions {
  // [..., K, levels], float32 (float64 for float64 x), added to the scores before decisions.
  at::Tensor noise = {};
  // [..., K, l], dtype as noise; multiplies the hidden activations of the leaf (dropout).
  at::Tensor leaf_scale = {};
  int64_t trees = 1;
  // [..., K, levels], dtype as noise; multiplies each decision's straight-through gradient. The
  // branch not taken is not evaluated where it is 0.
  at::Tensor alternates = {};
  // Whether a score of 0 goes right (arXiv 2308.14711) or left (arXiv 2311.10770). NaN goes left.
  bool tie_right = true;
  std::string node_activation = "identity";
  std::string leaf_activation = "relu";
  // Whether each decision on the path has the gradient of sigmoid(slope * score), through what the
  // two branches below it contribute; otherwise routing has no gradient.
  bool straight_through = false;
  double slope = 1.0;
  // Decisions whose sigmoid has at most this share of its steepest slope get no such gradient.
  double min_slope = 0.0;
  // Whether gradients of weights are sparse tensors of visited rows (CPU only).
  bool row_sparse_grad = false;
};

struct TreeOutput {
  at::Tensor output;  // [..., out], dtype of x
  at::Tensor scores;  // [..., K, levels] of the visited nodes; float64 for float64 x, else float32
  at::Tensor leaf;    // [..., K] int64: the leaf reached, or the last node's position in its level
};

// Hard trees: every token takes one path per tree, and only what it visits is computed.
//
//   output = sum_visited node_activation(s) node_output
//            + sum_j leaf_scale_j leaf_activation(<x, w1_j> + b1_j) w2_j + b2
//
// with s = <x, node_weight> + node_bias.
TORCH_FFF_API TreeOutput tree(const at::Tensor& x, const TreeWeights& weights,
                              const TreeOptions& options = {});

struct DescendOptions {
  at::Tensor noise = {};  // as in TreeOptions
  int64_t trees = 1;
  bool tie_right = true;
};

// The path alone, not differentiable: scores [..., K, levels] of the visited nodes and leaf
// [..., K] int64 in [0, 2^levels), counted after the decisions of all levels.
TORCH_FFF_API std::tuple<at::Tensor, at::Tensor> descend(const at::Tensor& x,
                                                         const at::Tensor& node_weight,
                                                         const at::Tensor& node_bias = {},
                                                         const DescendOptions& options = {});

// Weights of the leaves of a soft tree, [..., 2^d - 1] -> [..., 2^d]: the product over the leaf's
// path of sigmoid(z) where it turns right, sigmoid(-z) where left.
TORCH_FFF_API at::Tensor leaf_mixture(const at::Tensor& node_logits);

// activation(pre) times the weight of its leaf: pre [..., leaves * l], mixture [..., leaves]
// -> [..., leaves * l].
TORCH_FFF_API at::Tensor gated_activation(const at::Tensor& pre, const at::Tensor& mixture,
                                          std::string_view activation = "relu");

struct SoftTreeOptions {
  int64_t trees = 1;
  std::string node_activation = "identity";
  std::string leaf_activation = "relu";
};

struct SoftTreeOutput {
  at::Tensor output;       // [..., out]
  at::Tensor node_logits;  // [..., K, n], scores of all nodes
  at::Tensor mixture;      // [..., K, 2^levels], weights of all leaves
};

// Soft trees, the training form of arXiv 2308.14711: a mixture over all leaves,
// out(node) = c out(right child) + (1 - c) out(left child) with c = sigmoid(s).
TORCH_FFF_API SoftTreeOutput soft_tree(const at::Tensor& x, const TreeWeights& weights,
                                       const SoftTreeOptions& options = {});

// Entropy in nats of each decision c = sigmoid(z), elementwise; c is clamped to [1e-6, 1 - 1e-6].
// The hardening loss of a soft tree is the sum over nodes of its mean over tokens.
TORCH_FFF_API at::Tensor bernoulli_entropy(const at::Tensor& node_logits);

}  // namespace torch_fff
