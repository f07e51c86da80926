#include "tree.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include "dense_forest.h"
#include "launch.h"
#include "visited_rows.h"

namespace fff {
namespace {

// The arguments of one call, checked and made contiguous.
struct Arguments {
  at::Tensor x, node_weight;
  OptionalTensor node_bias, node_output, w1, b1, w2, b2, noise, leaf_scale, alternates;
  TreeForward params;
  at::DimVector leading;  // x's dimensions before the last

  at::DimVector with_leading(std::initializer_list<int64_t> last) const {
    at::DimVector sizes = leading;
    sizes.append(last.begin(), last.end());
    return sizes;
  }
};

Arguments check_arguments(const Check& check, const at::Tensor& x, const at::Tensor& node_weight,
                          const OptionalTensor& node_bias, const OptionalTensor& node_output,
                          const OptionalTensor& w1, const OptionalTensor& b1,
                          const OptionalTensor& w2, const OptionalTensor& b2,
                          const OptionalTensor& noise, const OptionalTensor& leaf_scale,
                          const OptionalTensor& alternates, int64_t trees, bool tie_right,
                          Activation node_activation, Activation leaf_activation, double min_slope,
                          bool routes_only) {
  Arguments a;
  TreeForward& p = a.params;
  p = {};
  p.dtype = check.dtype(x, "x");
  const at::ScalarType dtype = x.scalar_type();
  const at::ScalarType acc = accumulation_type(dtype);
  TORCH_CHECK(x.dim() >= 1, check.op(), ": x must have shape [..., input_width], got a scalar");
  check.same(node_weight, "node_weight", x, dtype);

  TreeShape& s = p.shape;
  s.levels = check.levels(node_weight, trees);
  s.trees = trees;
  s.input_width = x.size(-1);
  a.leading = at::DimVector(x.sizes().begin(), x.sizes().end() - 1);
  s.tokens = c10::multiply_integers(a.leading);
  TORCH_CHECK(node_weight.size(1) == s.input_width, check.op(), ": x must have last dimension ",
              node_weight.size(1), " (the columns of node_weight), got shape ", x.sizes());
  const int64_t nodes = trees * s.nodes();
  check.optional(node_bias, "node_bias", x, dtype, {nodes});
  check.optional(noise, "noise", x, acc, a.with_leading({trees, s.levels}));
  check.optional(alternates, "alternates", x, acc, a.with_leading({trees, s.levels}));
  TORCH_CHECK_VALUE(min_slope >= 0 && min_slope <= 1, check.op(),
                    ": min_slope must be in [0, 1], got ", min_slope);

  const bool has_leaves = defined(w1);
  TORCH_CHECK(defined(w2) == has_leaves, check.op(), ": w1 and w2 must come together, got only ",
              has_leaves ? "w1" : "w2");
  s.decisions = has_leaves || routes_only ? s.levels : s.levels - 1;
  if (has_leaves) {
    const int64_t leaves = trees * s.leaves();
    TORCH_CHECK(w1->dim() == 3 && w1->size(1) >= 1, check.op(),
                ": w1 must have shape [trees * leaves, leaf_width, input_width], got ",
                w1->sizes());
    TORCH_CHECK(w2->dim() == 3, check.op(),
                ": w2 must have shape [trees * leaves, leaf_width, output_width], got ",
                w2->sizes());
    s.leaf_width = w1->size(1);
    s.output_width = w2->size(2);
    check.optional(w1, "w1", x, dtype, {leaves, s.leaf_width, s.input_width});
    check.optional(w2, "w2", x, dtype, {leaves, s.leaf_width, s.output_width});
    check.optional(b1, "b1", x, dtype, {leaves, s.leaf_width});
    check.optional(b2, "b2", x, dtype, {leaves, s.output_width});
    check.optional(leaf_scale, "leaf_scale", x, acc, a.with_leading({trees, s.leaf_width}));
  } else {
    TORCH_CHECK(routes_only || defined(node_output), check.op(),
                ": node_output or w1 and w2 must be given, got neither");
    TORCH_CHECK(routes_only || s.levels >= 1, check.op(),
                ": a tree without leaf networks must have at least one node, got none");
    const char* given = defined(b1) ? "b1" : defined(b2) ? "b2" : "leaf_scale";
    TORCH_CHECK(!defined(b1) && !defined(b2) && !defined(leaf_scale), check.op(),
                ": b1, b2 and leaf_scale must be absent without w1 and w2, got ", given);
    TORCH_CHECK(routes_only || node_output->dim() == 2, check.op(),
                ": node_output must have shape [trees * nodes, output_width], got shape ",
                routes_only ? at::IntArrayRef() : node_output->sizes());
    s.output_width = routes_only ? 0 : node_output->size(1);
  }
  check.optional(node_output, "node_output", x, dtype, {nodes, s.output_width});
  TORCH_CHECK(s.levels < 48, check.op(), ": node_weight must have fewer than 48 levels, got ",
              s.levels);

  a.x = x.contiguous();
  a.node_weight = node_weight.contiguous();
  a.node_bias = contiguous(node_bias);
  a.node_output = contiguous(node_output);
  a.w1 = contiguous(w1);
  a.b1 = contiguous(b1);
  a.w2 = contiguous(w2);
  a.b2 = contiguous(b2);
  a.noise = contiguous(noise);
  a.leaf_scale = contiguous(leaf_scale);
  a.alternates = contiguous(alternates);
  p.tie_right = tie_right;
  p.node_activation = node_activation;
  p.leaf_activation = leaf_activation;
  p.weights = {a.node_weight.data_ptr(), data_or_null(a.node_bias), data_or_null(a.node_output),
               data_or_null(a.w1),       data_or_null(a.b1),        data_or_null(a.w2),
               data_or_null(a.b2)};
  p.x = a.x.data_ptr();
  p.noise = data_or_null(a.noise);
  p.leaf_scale = data_or_null(a.leaf_scale);
  p.allow_tf32 = x.is_cuda() && at::globalContext().allowTF32CuBLAS();
  return a;
}

// Sums over several trees are formed in the accumulation type.
at::ScalarType sum_type(const at::Tensor& x, int64_t trees) {
  return trees > 1 ? accumulation_type(x.scalar_type()) : x.scalar_type();
}

// A conversion that costs nothing, not even the call of an operator, where there is nothing to do.
at::Tensor as_type(at::Tensor t, at::ScalarType type) {
  return t.scalar_type() == type ? std::move(t) : t.to(type);
}

DType as_dtype(at::ScalarType type, DType own) {
  return type == at::kFloat ? DType::kFloat : type == at::kDouble ? DType::kDouble : own;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> tree(
    const at::Tensor& x, const at::Tensor& node_weight, const OptionalTensor& node_bias,
    const OptionalTensor& node_output, const OptionalTensor& w1, const OptionalTensor& b1,
    const OptionalTensor& w2, const OptionalTensor& b2, const OptionalTensor& noise,
    const OptionalTensor& leaf_scale, const OptionalTensor& alternates, int64_t trees,
    bool tie_right, std::string_view node_activation, std::string_view leaf_activation,
    bool /*straight_through*/, double /*slope*/, double min_slope, bool /*row_sparse_grad*/) {
  const Check check("fff::tree");
  Arguments a = check_arguments(
      check, x, node_weight, node_bias, node_output, w1, b1, w2, b2, noise, leaf_scale, alternates,
      trees, tie_right, check.activation(node_activation, "node_activation"),
      check.activation(leaf_activation, "leaf_activation"), min_slope, false);
  TreeForward& p = a.params;
  const at::ScalarType acc = accumulation_type(x.scalar_type());
  const at::ScalarType sum = sum_type(x, trees);
  at::Tensor scores = at::empty(a.with_leading({trees, p.shape.levels}), x.options().dtype(acc));
  at::Tensor leaf = at::empty(a.with_leading({trees}), x.options().dtype(at::kLong));
  p.scores = scores.data_ptr();
  p.leaf = leaf.data_ptr<int64_t>();
  if (suits_dense_forest(p, x, false)) {
    const at::Tensor y = dense_forest(p, a.x.view({p.shape.tokens, p.shape.input_width}),
                                      a.node_weight, a.node_bias, *a.node_output);
    return {y.view(a.with_leading({p.shape.output_width})), scores, leaf};
  }
  at::Tensor output = at::empty(a.with_leading({p.shape.output_width}), x.options().dtype(sum));
  if (p.shape.tokens > 0) {
    p.output = output.data_ptr();
    p.output_dtype = as_dtype(sum, p.dtype);
    launch(check.op(), x, p, &cpu::Kernels::tree_forward, FFF_CUDA_KERNEL(tree_forward));
  }
  return {as_type(std::move(output), x.scalar_type()), std::move(scores), std::move(leaf)};
}

std::tuple<at::Tensor, at::Tensor> descend(const at::Tensor& x, const at::Tensor& node_weight,
                                           const OptionalTensor& node_bias,
                                           const OptionalTensor& noise, int64_t trees,
                                           bool tie_right) {
  const Check check("fff::descend");
  Arguments a =
      check_arguments(check, x, node_weight, node_bias, {}, {}, {}, {}, {}, noise, {}, {}, trees,
                      tie_right, Activation::kIdentity, Activation::kIdentity, 0, true);
  TreeForward& p = a.params;
  const at::ScalarType acc = accumulation_type(x.scalar_type());
  at::Tensor scores = at::empty(a.with_leading({trees, p.shape.levels}), x.options().dtype(acc));
  at::Tensor leaf = at::empty(a.with_leading({trees}), x.options().dtype(at::kLong));
  if (p.shape.tokens > 0) {
    p.scores = scores.data_ptr();
    p.leaf = leaf.data_ptr<int64_t>();
    launch(check.op(), x, p, &cpu::Kernels::tree_forward, FFF_CUDA_KERNEL(tree_forward));
  }
  return {scores, leaf};
}

namespace {

// `visited`, if given, is filled, and the gradients of weights have its rows alone.
TreeGradients gradients(const Check& check, const OptionalTensor& grad_output,
                        const OptionalTensor& grad_scores, const at::Tensor& scores,
                        const at::Tensor& leaf, const at::Tensor& x, const at::Tensor& node_weight,
                        const OptionalTensor& node_bias, const OptionalTensor& node_output,
                        const OptionalTensor& w1, const OptionalTensor& b1,
                        const OptionalTensor& w2, const OptionalTensor& b2,
                        const OptionalTensor& noise, const OptionalTensor& leaf_scale,
                        const OptionalTensor& alternates, int64_t trees, bool tie_right,
                        std::string_view node_activation, std::string_view leaf_activation,
                        bool straight_through, double slope, double min_slope,
                        std::array<bool, 3> output_mask, VisitedRows* visited) {
  Arguments a = check_arguments(
      check, x, node_weight, node_bias, node_output, w1, b1, w2, b2, noise, leaf_scale, alternates,
      trees, tie_right, check.activation(node_activation, "node_activation"),
      check.activation(leaf_activation, "leaf_activation"), min_slope, false);
  const TreeShape& s = a.params.shape;
  const at::ScalarType dtype = x.scalar_type();
  const at::ScalarType acc = accumulation_type(dtype);
  const auto output_shape = a.with_leading({s.output_width});
  const auto scores_shape = a.with_leading({trees, s.levels});
  check.optional(grad_output, "grad_output", x, dtype, output_shape);
  check.optional(grad_scores, "grad_scores", x, acc, scores_shape);
  check.optional(scores, "scores", x, acc, scores_shape);
  check.optional(leaf, "leaf", x, at::kLong, a.with_leading({trees}));

  const at::Tensor g =
      defined(grad_output) ? grad_output->contiguous() : at::zeros(output_shape, x.options());
  const OptionalTensor gs = contiguous(grad_scores);
  const at::Tensor own_scores = scores.contiguous();
  const at::Tensor own_leaf = leaf.contiguous();
  RowIds nodes = {}, leaves = {};
  if (visited) {
    const auto ids = [](const std::vector<int64_t>& v) {
      return RowIds{v.data(), static_cast<int64_t>(v.size())};
    };
    *visited = visited_rows(s, own_leaf.data_ptr<int64_t>());
    nodes = ids(visited->nodes);
    leaves = ids(visited->leaves);
  }
  const auto absent = [&] { return at::empty({0}, x.options()); };
  const at::ScalarType of_weights = x.is_cuda() ? dtype : acc;
  const auto gradient_of = [&](const OptionalTensor& weight, bool wanted, const RowIds& rows,
                               bool written_whole) {
    if (!defined(weight) || !wanted) {
      return absent();
    }
    at::DimVector sizes(weight->sizes());
    if (visited) {
      sizes[0] = rows.count;
    }
    const auto options = weight->options().dtype(of_weights);
    return written_whole ? at::empty(sizes, options) : at::zeros(sizes, options);
  };
  const auto pointer = [](const at::Tensor& gradient) -> void* {
    return gradient.numel() > 0 ? gradient.data_ptr() : nullptr;
  };

  TreeBackward p = {};
  p.forward = a.params;
  p.grad_output = g.data_ptr();
  p.grad_scores = data_or_null(gs);
  p.scores = own_scores.data_ptr();
  p.leaf = own_leaf.data_ptr<int64_t>();
  p.straight_through = straight_through;
  p.slope = slope;
  p.min_slope = min_slope;
  p.alternates = data_or_null(a.alternates);
  p.nodes = nodes;
  p.leaves = leaves;

  const bool mask_x = output_mask[0], mask_nodes = output_mask[1], mask_leaves = output_mask[2];
  if (!visited && suits_dense_forest(a.params, x, straight_through)) {
    DenseForestGradients grads = dense_forest_backward(
        p, g.view({s.tokens, s.output_width}), a.x.view({s.tokens, s.input_width}), a.node_weight,
        *a.node_output, mask_x, mask_nodes);
    return {mask_x ? grads.x.view(x.sizes()) : absent(),
            grads.node_weight,
            grads.node_bias,
            grads.node_output,
            absent(),
            absent(),
            absent(),
            absent()};
  }

  const at::ScalarType sum = sum_type(x, trees);
  const at::Tensor grad_x = mask_x ? at::empty(a.x.sizes(), x.options().dtype(sum)) : absent();
  const bool whole = x.is_cuda() && s.tokens > 0;
  const auto of_nodes = [&](const OptionalTensor& weight) {
    return gradient_of(weight, mask_nodes, nodes, whole && p.scores_have_gradients());
  };
  const auto of_leaves = [&](const OptionalTensor& weight) {
    return gradient_of(weight, mask_leaves, leaves, whole);
  };
  const at::Tensor grad_node_weight = of_nodes(a.node_weight);
  const at::Tensor grad_node_bias = of_nodes(a.node_bias);
  const at::Tensor grad_node_output = of_nodes(a.node_output);
  const at::Tensor grad_w1 = of_leaves(a.w1);
  const at::Tensor grad_b1 = of_leaves(a.b1);
  const at::Tensor grad_w2 = of_leaves(a.w2);
  const at::Tensor grad_b2 = of_leaves(a.b2);

  if (s.tokens > 0) {
    p.grad_x = pointer(grad_x);
    p.grad_x_dtype = as_dtype(sum, a.params.dtype);
    p.grad_weights_dtype = as_dtype(of_weights, a.params.dtype);
    p.grad_node_weight = pointer(grad_node_weight);
    p.grad_node_bias = pointer(grad_node_bias);
    p.grad_node_output = pointer(grad_node_output);
    p.grad_w1 = pointer(grad_w1);
    p.grad_b1 = pointer(grad_b1);
    p.grad_w2 = pointer(grad_w2);
    p.grad_b2 = pointer(grad_b2);
    launch(check.op(), x, p, &cpu::Kernels::tree_backward, FFF_CUDA_KERNEL(tree_backward));
  }
  return {as_type(grad_x, dtype),         as_type(grad_node_weight, dtype),
          as_type(grad_node_bias, dtype), as_type(grad_node_output, dtype),
          as_type(grad_w1, dtype),        as_type(grad_b1, dtype),
          as_type(grad_w2, dtype),        as_type(grad_b2, dtype)};
}

}  // namespace

TreeGradients tree_backward(const OptionalTensor& grad_output, const OptionalTensor& grad_scores,
                            const at::Tensor& scores, const at::Tensor& leaf, const at::Tensor& x,
                            const at::Tensor& node_weight, const OptionalTensor& node_bias,
                            const OptionalTensor& node_output, const OptionalTensor& w1,
                            const OptionalTensor& b1, const OptionalTensor& w2,
                            const OptionalTensor& b2, const OptionalTensor& noise,
                            const OptionalTensor& leaf_scale, const OptionalTensor& alternates,
                            int64_t trees, bool tie_right, std::string_view node_activation,
                            std::string_view leaf_activation, bool straight_through, double slope,
                            double min_slope, std::array<bool, 3> output_mask) {
  return gradients(Check("fff::tree_backward"), grad_output, grad_scores, scores, leaf, x,
                   node_weight, node_bias, node_output, w1, b1, w2, b2, noise, leaf_scale,
                   alternates, trees, tie_right, node_activation, leaf_activation, straight_through,
                   slope, min_slope, output_mask, nullptr);
}

TreeRowGradients tree_backward_rows(
    const OptionalTensor& grad_output, const OptionalTensor& grad_scores, const at::Tensor& scores,
    const at::Tensor& leaf, const at::Tensor& x, const at::Tensor& node_weight,
    const OptionalTensor& node_bias, const OptionalTensor& node_output, const OptionalTensor& w1,
    const OptionalTensor& b1, const OptionalTensor& w2, const OptionalTensor& b2,
    const OptionalTensor& noise, const OptionalTensor& leaf_scale, const OptionalTensor& alternates,
    int64_t trees, bool tie_right, std::string_view node_activation,
    std::string_view leaf_activation, bool straight_through, double slope, double min_slope,
    std::array<bool, 3> output_mask) {
  const Check check("fff::tree_backward_rows");
  TORCH_CHECK(x.is_cpu(), check.op(), ": x must be on the CPU for row_sparse_grad, got ",
              x.device());
  VisitedRows visited;
  auto [of_x, node_weight_rows, node_bias_rows, node_output_rows, w1_rows, b1_rows, w2_rows,
        b2_rows] = gradients(check, grad_output, grad_scores, scores, leaf, x, node_weight,
                             node_bias, node_output, w1, b1, w2, b2, noise, leaf_scale, alternates,
                             trees, tie_right, node_activation, leaf_activation, straight_through,
                             slope, min_slope, output_mask, &visited);
  const auto as_tensor = [](const std::vector<int64_t>& ids) {
    at::Tensor t = at::empty({static_cast<int64_t>(ids.size())}, at::kLong);
    std::copy(ids.begin(), ids.end(), t.data_ptr<int64_t>());
    return t;
  };
  return {of_x,
          as_tensor(visited.nodes),
          as_tensor(visited.leaves),
          node_weight_rows,
          node_bias_rows,
          node_output_rows,
          w1_rows,
          b1_rows,
          w2_rows,
          b2_rows};
}

}  // namespace fff
