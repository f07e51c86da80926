// The API table: every operator's schema, and the function that serves it.
//
// Shapes (K trees of n = 2^levels - 1 nodes in heap order and 2^levels leaves):
//   x [..., in]  node_weight [K*n, in]  node_bias [K*n]  node_output [K*n, out]
//   w1 [K*leaves, l, in]  b1 [K*leaves, l]  w2 [K*leaves, l, out]  b2 [K*leaves, out]
//   mixture [..., K, leaves]
//   noise, alternates, scores [..., K, levels]  leaf_scale [..., K, l]  leaf [..., K]
// A tree has node outputs, leaf networks below its nodes, or both. scores, noise, alternates and
// leaf_scale are float32 (float64 for float64 x).

#include <torch/library.h>

#include "gated_activation.h"
#include "leaf_mixture.h"
#include "linear.h"
#include "sparse_leaves.h"
#include "sparse_linear.h"
#include "tree.h"

TORCH_LIBRARY(fff, m) {
  const auto tags = std::vector<at::Tag>{at::Tag::pt2_compliant_tag};

  // Soft tree.
  m.def("leaf_mixture(Tensor node_logits) -> Tensor", tags);
  m.def("leaf_mixture_backward(Tensor grad_mixture, Tensor node_logits, Tensor mixture) -> Tensor",
        tags);
  m.def("gated_activation(Tensor pre, Tensor mixture, str activation) -> Tensor", tags);
  m.def(
      "gated_activation_backward(Tensor grad_output, Tensor pre, Tensor mixture, str activation)"
      " -> (Tensor grad_pre, Tensor grad_mixture)",
      tags);
  m.def(
      "sparse_leaves(Tensor x, Tensor mixture, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2,"
      " float prune, str activation) -> Tensor",
      tags);
  m.def(
      "sparse_leaves_backward(Tensor grad_output, Tensor x, Tensor mixture, Tensor w1, Tensor? b1,"
      " Tensor w2, Tensor? b2, float prune, str activation, bool[2] output_mask) -> (Tensor x,"
      " Tensor mixture, Tensor w1, Tensor b1, Tensor w2, Tensor b2)",
      tags);
  m.def(
      "sparse_linear_backward(Tensor grad_output, Tensor x, Tensor weight, bool[2] output_mask)"
      " -> (Tensor x, Tensor weight)",
      tags);

  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", tags);
  m.def(
      "linear_backward(Tensor grad_output, Tensor x, Tensor weight, bool[3] output_mask)"
      " -> (Tensor x, Tensor weight, Tensor bias)",
      tags);

  // Hard tree.
  m.def(
      "descend(Tensor x, Tensor node_weight, Tensor? node_bias, Tensor? noise, int trees,"
      " bool tie_right) -> (Tensor scores, Tensor leaf)",
      tags);
  m.def(
      "tree(Tensor x, Tensor node_weight, Tensor? node_bias, Tensor? node_output, Tensor? w1,"
      " Tensor? b1, Tensor? w2, Tensor? b2, Tensor? noise, Tensor? leaf_scale,"
      " Tensor? alternates, int trees, bool tie_right, str node_activation, str leaf_activation,"
      " bool straight_through, float slope, float min_slope=0., bool row_sparse_grad=False) ->"
      " (Tensor output, Tensor scores, Tensor leaf)",
      tags);
  m.def(
      "tree_backward(Tensor? grad_output, Tensor? grad_scores, Tensor scores, Tensor leaf,"
      " Tensor x, Tensor node_weight, Tensor? node_bias, Tensor? node_output, Tensor? w1,"
      " Tensor? b1, Tensor? w2, Tensor? b2, Tensor? noise, Tensor? leaf_scale,"
      " Tensor? alternates, int trees, bool tie_right, str node_activation, str leaf_activation,"
      " bool straight_through, float slope, float min_slope, bool[3] output_mask) -> (Tensor x,"
      " Tensor node_weight, Tensor node_bias, Tensor node_output, Tensor w1, Tensor b1,"
      " Tensor w2, Tensor b2)",
      tags);
  // The same with visited rows alone: nodes [m] and leaves [r] are their ids, ascending; m or r
  // stands for K*n or K*leaves in the shapes of the gradients.
  m.def(
      "tree_backward_rows(Tensor? grad_output, Tensor? grad_scores, Tensor scores, Tensor leaf,"
      " Tensor x, Tensor node_weight, Tensor? node_bias, Tensor? node_output, Tensor? w1,"
      " Tensor? b1, Tensor? w2, Tensor? b2, Tensor? noise, Tensor? leaf_scale,"
      " Tensor? alternates, int trees, bool tie_right, str node_activation, str leaf_activation,"
      " bool straight_through, float slope, float min_slope, bool[3] output_mask) -> (Tensor x,"
      " Tensor nodes, Tensor leaves, Tensor node_weight, Tensor node_bias, Tensor node_output,"
      " Tensor w1, Tensor b1, Tensor w2, Tensor b2)",
      tags);
}

namespace {

void register_kernels(torch::Library& m) {
  m.impl("leaf_mixture", TORCH_FN(fff::leaf_mixture));
  m.impl("leaf_mixture_backward", TORCH_FN(fff::leaf_mixture_backward));
  m.impl("gated_activation", TORCH_FN(fff::gated_activation));
  m.impl("gated_activation_backward", TORCH_FN(fff::gated_activation_backward));
  m.impl("linear", TORCH_FN(fff::linear));
  m.impl("linear_backward", TORCH_FN(fff::linear_backward));
  m.impl("sparse_leaves", TORCH_FN(fff::sparse_leaves));
  m.impl("sparse_leaves_backward", TORCH_FN(fff::sparse_leaves_backward));
  m.impl("sparse_linear_backward", TORCH_FN(fff::sparse_linear_backward));
  m.impl("descend", TORCH_FN(fff::descend));
  m.impl("tree", TORCH_FN(fff::tree));
  m.impl("tree_backward", TORCH_FN(fff::tree_backward));
  m.impl("tree_backward_rows", TORCH_FN(fff::tree_backward_rows));
}

}  // namespace

TORCH_LIBRARY_IMPL(fff, CPU, m) {
  register_kernels(m);
}

// Also in a build without CUDA kernels, where a CUDA tensor gets an error that says so.
TORCH_LIBRARY_IMPL(fff, CUDA, m) {
  register_kernels(m);
}
