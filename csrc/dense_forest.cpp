#include "dense_forest.h"

#include <ATen/ops/empty.h>

#include "cpu/kernels.h"
#include "linear.h"

namespace fff {

bool suits_dense_forest(const TreeForward& p, const at::Tensor& x, bool straight_through) {
  // Measured, 768 wide: of few tokens only the bytes of the rows count, and of many a walk of 4
  // levels, which visits 4 of 15 nodes, is as fast as all of them in a product.
  constexpr int64_t few_tokens = 16;
  constexpr int64_t many_tokens = 256;
  constexpr int64_t least_work = int64_t(1) << 21;
  const TreeShape& s = p.shape;
  return x.is_cpu() && x.scalar_type() == at::kFloat && s.leaf_width == 0 &&
         p.weights.node_output != nullptr && (!straight_through || s.decisions == 0) &&
         s.tokens * s.trees * s.nodes() * s.input_width >= least_work &&
         (s.levels == 1 ||
          (s.tokens >= few_tokens && (s.levels <= 3 || (s.levels == 4 && s.tokens < many_tokens))));
}

at::Tensor dense_forest(const TreeForward& p, const at::Tensor& x, const at::Tensor& node_weight,
                        const OptionalTensor& node_bias, const at::Tensor& node_output) {
  const at::Tensor scores = linear(x, node_weight, node_bias);
  const at::Tensor gates = at::empty(scores.sizes(), scores.options());
  PathGates paths = {};
  paths.forward = p;
  paths.all_scores = scores.const_data_ptr<float>();
  paths.gates = gates.data_ptr<float>();
  cpu::kernels().path_gates(paths);
  return linear(gates, node_output.t(), {});
}

DenseForestGradients dense_forest_backward(const TreeBackward& p, const at::Tensor& grad_output,
                                           const at::Tensor& x, const at::Tensor& node_weight,
                                           const at::Tensor& node_output, bool wants_x,
                                           bool wants_nodes) {
  const at::Tensor grad_gates = linear(grad_output, node_output, {});
  const at::Tensor gates = at::empty(grad_gates.sizes(), x.options());
  const at::Tensor grad_scores = at::empty(grad_gates.sizes(), x.options());
  PathGates paths = {};
  paths.forward = p.forward;
  paths.scores = static_cast<const float*>(p.scores);
  paths.leaf = p.leaf;
  paths.grad_scores = static_cast<const float*>(p.grad_scores);
  paths.grad_gates = grad_gates.const_data_ptr<float>();
  paths.gates = gates.data_ptr<float>();
  paths.grad_all_scores = grad_scores.data_ptr<float>();
  cpu::kernels().path_gates_backward(paths);
  auto [of_x, of_weight, of_bias] =
      linear_backward(grad_scores, x, node_weight, {wants_x, wants_nodes, wants_nodes});
  const at::Tensor of_output = std::get<1>(
      linear_backward(grad_output, gates, node_output.t(), {false, wants_nodes, false}));
  return {of_x, of_weight, of_bias, wants_nodes ? of_output.t() : of_output};
}

}  // namespace fff
