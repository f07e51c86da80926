#include "dense_forest.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "launch.h"
#include "linear.h"

namespace fff {

namespace {

// Measured, 768 wide: of few tokens only the bytes of the rows count, and of many a walk of 4
// levels, which visits 4 of 15 nodes, is as fast as all of them in a product.
bool suits_on_cpu(const TreeShape& s, const at::Tensor& x) {
  constexpr int64_t few_tokens = 16;
  constexpr int64_t many_tokens = 256;
  return x.scalar_type() == at::kFloat &&
         (s.levels == 1 ||
          (s.tokens >= few_tokens && (s.levels <= 3 || (s.levels == 4 && s.tokens < many_tokens))));
}

// Predicted, see docs/cuda.md. Of few tokens each has a multiprocessor that reads the rows of all
// its paths; of many each tree adds to the output in turn; and without matrix units a walk reads
// a row for every product that the others make of one.
bool suits_on_gpu(const TreeForward& p, const at::Tensor& x) {
  constexpr int64_t few_tokens = 256;
  constexpr int64_t many_rows = 256;
  constexpr int64_t most_neurons = int64_t(1) << 28;  // of all tokens, for they take memory
  const TreeShape& s = p.shape;
  if (x.scalar_type() == at::kDouble || s.tokens * s.trees * s.nodes() > most_neurons) {
    return false;
  }
  if (x.scalar_type() == at::kHalf && at::globalContext().allowFP16AccumulationCuBLAS()) {
    return false;  // cuBLAS then has no sums of halves in float32
  }
  if (s.tokens <= few_tokens) {
    return s.levels <= 6 && s.trees * s.levels >= many_rows;
  }
  const bool matrix_units = x.scalar_type() != at::kFloat || p.allow_tf32;
  return matrix_units ? s.trees > 1 && s.levels <= 8 : s.levels <= 7;
}

// x weight^T in float32 whatever the factors are, for routes depend on it.
at::Tensor float_product(const at::Tensor& x, const at::Tensor& weight) {
  if (x.scalar_type() == at::kFloat) {
    return linear(x, weight, {});
  }
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  return at::mm(x, weight.t(), at::kFloat);
}

}  // namespace

bool suits_dense_forest(const TreeForward& p, const at::Tensor& x, bool straight_through) {
  constexpr int64_t least_work = int64_t(1) << 21;
  const TreeShape& s = p.shape;
  return s.leaf_width == 0 && p.weights.node_output != nullptr &&
         s.tokens * s.trees * s.nodes() * s.input_width >= least_work &&
         (x.is_cpu() ? suits_on_cpu(s, x) && (!straight_through || s.decisions == 0)
                     : suits_on_gpu(p, x));
}

at::Tensor dense_forest(const TreeForward& p, const at::Tensor& x, const at::Tensor& node_weight,
                        const OptionalTensor& node_bias, const at::Tensor& node_output) {
  const at::Tensor scores =
      x.is_cpu() ? linear(x, node_weight, node_bias) : float_product(x, node_weight);
  const at::Tensor gates = at::empty(scores.sizes(), x.options());
  PathGates paths = {};
  paths.tree.forward = p;
  paths.all_scores = scores.const_data_ptr<float>();
  paths.bias = x.is_cpu() ? nullptr : p.weights.node_bias;
  paths.gates = gates.data_ptr();
  launch("fff::tree", x, paths, &cpu::Kernels::path_gates, FFF_CUDA_KERNEL(path_gates));
  return linear(gates, node_output.t(), {});
}

DenseForestGradients dense_forest_backward(const TreeBackward& p, const at::Tensor& grad_output,
                                           const at::Tensor& x, const at::Tensor& node_weight,
                                           const at::Tensor& node_output, bool wants_x,
                                           bool wants_nodes) {
  at::Tensor grad_gates = float_product(grad_output, node_output);
  const at::Tensor grad_scores = at::empty(grad_gates.sizes(), x.options());
  at::Tensor gates, scores;
  PathGates paths = {};
  paths.tree = p;
  if (p.straight_through && p.forward.shape.decisions > 0) {
    scores = float_product(x, node_weight);
    paths.all_scores = scores.const_data_ptr<float>();
    paths.bias = p.forward.weights.node_bias;
  }
  if (wants_nodes || x.is_cpu()) {
    gates = at::empty(grad_gates.sizes(), x.options());
    paths.gates = gates.data_ptr();
  }
  paths.grad_gates = grad_gates.const_data_ptr<float>();
  paths.grad_all_scores = grad_scores.data_ptr();
  launch("fff::tree_backward", x, paths, &cpu::Kernels::path_gates_backward,
         FFF_CUDA_KERNEL(path_gates_backward));
  scores = grad_gates = at::Tensor();  // their memory serves the products
  const bool wants_bias = wants_nodes && p.forward.weights.node_bias;
  auto [of_x, of_weight, of_bias] =
      linear_backward(grad_scores, x, node_weight, {wants_x, wants_nodes, wants_bias});
  if (!wants_nodes) {
    return {of_x, of_weight, of_bias, at::empty({0}, x.options())};
  }
  const at::Tensor of_output =
      std::get<1>(linear_backward(grad_output, gates, node_output.t(), {false, true, false}));
  return {of_x, of_weight, of_bias, of_output.t()};
}

}  // namespace fff
