#include "functional.h"

#include <ATen/Functions.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include "../gated_activation.h"
#include "../leaf_mixture.h"
#include "../linear.h"
#include "../tree.h"

namespace torch_fff {
namespace {

using fff::OptionalTensor;

template <typename Signature>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

OptionalTensor optional(const at::Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}

// x [tokens, in] weight^T + bias; where ATen's product is not the fastest there is, by our
// operator, which has no autocast rule.
at::Tensor product(const at::Tensor& x, const at::Tensor& weight, const OptionalTensor& bias) {
  static const auto op = find<decltype(fff::linear)>("fff::linear");
  if (x.is_cpu() && x.scalar_type() == at::kFloat && !at::autocast::is_autocast_enabled(at::kCPU)) {
    return op.call(x, weight, bias);
  }
  return at::linear(x, weight, bias);
}

// Weight with which each node is reached, [..., 2^d] -> [..., 2^d - 1] in heap order: the sum of
// the mixture over the leaves below it.
at::Tensor node_reach(at::Tensor mixture) {
  std::vector<at::Tensor> levels;
  while (mixture.size(-1) > 1) {
    mixture = mixture.unflatten(-1, {mixture.size(-1) / 2, 2}).sum(-1);
    levels.insert(levels.begin(), mixture);
  }
  return at::cat(levels, -1);
}

// Checks what the products of a soft tree would not, or not in words that help.
void check_soft_tree(const at::Tensor& x, const TreeWeights& w, int64_t trees) {
  const fff::Check check("torch_fff::soft_tree");
  check.dtype(x, "x");
  const int64_t nodes = trees * ((int64_t(1) << check.levels(w.node_weight, trees)) - 1);
  const int64_t width = w.node_weight.size(1);
  TORCH_CHECK(x.dim() >= 1 && x.size(-1) == width, check.op(), ": x must have shape [..., ", width,
              "] (the columns of node_weight), got ", x.sizes());
  TORCH_CHECK(w.w1.defined() == w.w2.defined(), check.op(),
              ": w1 and w2 must come together, got only ", w.w1.defined() ? "w1" : "w2");
  const bool has_leaves = w.w1.defined();
  TORCH_CHECK(has_leaves || (!w.b1.defined() && !w.b2.defined()), check.op(),
              ": b1 and b2 must be absent without w1 and w2");
  TORCH_CHECK(has_leaves || (w.node_output.defined() && nodes > 0), check.op(),
              ": node_output of at least one node or w1 and w2 must be given, got neither");
  const at::Tensor& rows = has_leaves ? w.w2 : w.node_output;
  const int64_t leaf_width = has_leaves && w.w1.dim() == 3 ? w.w1.size(1) : 0;
  const int64_t out = rows.dim() > 0 ? rows.size(-1) : 0;
  const int64_t leaves = nodes + trees;
  const auto same = [&](const at::Tensor& t, const char* argument, at::IntArrayRef shape) {
    if (t.defined()) {
      TORCH_CHECK(t.device() == x.device(), check.op(), ": ", argument, " must be on ", x.device(),
                  " like x, got ", t.device());
      check.shape(t, argument, shape);
    }
  };
  same(w.node_weight, "node_weight", {nodes, width});
  same(w.node_bias, "node_bias", {nodes});
  same(w.node_output, "node_output", {nodes, out});
  same(w.w1, "w1", {leaves, leaf_width, width});
  same(w.b1, "b1", {leaves, leaf_width});
  same(w.w2, "w2", {leaves, leaf_width, out});
  same(w.b2, "b2", {leaves, out});
}

}  // namespace

TreeOutput tree(const at::Tensor& x, const TreeWeights& w, const TreeOptions& o) {
  static const auto op = find<decltype(fff::tree)>("fff::tree");
  auto [output, scores, leaf] = op.call(
      x, w.node_weight, optional(w.node_bias), optional(w.node_output), optional(w.w1),
      optional(w.b1), optional(w.w2), optional(w.b2), optional(o.noise), optional(o.leaf_scale),
      optional(o.alternates), o.trees, o.tie_right, o.node_activation, o.leaf_activation,
      o.straight_through, o.slope, o.min_slope, o.row_sparse_grad);
  return {std::move(output), std::move(scores), std::move(leaf)};
}

std::tuple<at::Tensor, at::Tensor> descend(const at::Tensor& x, const at::Tensor& node_weight,
                                           const at::Tensor& node_bias, const DescendOptions& o) {
  static const auto op = find<decltype(fff::descend)>("fff::descend");
  return op.call(x, node_weight, optional(node_bias), optional(o.noise), o.trees, o.tie_right);
}

at::Tensor leaf_mixture(const at::Tensor& node_logits) {
  static const auto op = find<decltype(fff::leaf_mixture)>("fff::leaf_mixture");
  return op.call(node_logits);
}

at::Tensor gated_activation(const at::Tensor& pre, const at::Tensor& mixture,
                            std::string_view activation) {
  static const auto op = find<decltype(fff::gated_activation)>("fff::gated_activation");
  return op.call(pre, mixture, activation);
}

SoftTreeOutput soft_tree(const at::Tensor& x, const TreeWeights& w, const SoftTreeOptions& o) {
  check_soft_tree(x, w, o.trees);
  const int64_t nodes = w.node_weight.size(0);
  const auto leading = x.sizes().slice(0, x.dim() - 1);
  const auto with_leading = [&](std::initializer_list<int64_t> last) {
    at::DimVector sizes(leading.begin(), leading.end());
    sizes.append(last.begin(), last.end());
    return sizes;
  };
  const at::Tensor tokens = x.reshape({c10::multiply_integers(leading), x.size(-1)});
  const at::Tensor logits = product(tokens, w.node_weight, optional(w.node_bias));
  const at::Tensor node_logits = logits.view(with_leading({o.trees, nodes / o.trees}));
  const at::Tensor mixture = leaf_mixture(node_logits);
  at::Tensor output;
  const auto add_product = [&](const at::Tensor& a, const at::Tensor& b) {
    const at::Tensor y = product(a, b.t(), {});
    output = output.defined() ? at::add(output, y) : y;
  };
  if (w.w1.defined()) {
    const at::Tensor weights = mixture.view({tokens.size(0), nodes + o.trees});
    const OptionalTensor b1 = w.b1.defined() ? OptionalTensor(w.b1.flatten()) : std::nullopt;
    const at::Tensor pre = product(tokens, w.w1.flatten(0, 1), b1);
    add_product(gated_activation(pre, weights, o.leaf_activation), w.w2.flatten(0, 1));
    if (w.b2.defined()) {
      add_product(weights, w.b2);
    }
  }
  if (w.node_output.defined() && nodes > 0) {
    const at::Tensor reach = node_reach(mixture).view({tokens.size(0), nodes});
    add_product(gated_activation(logits, reach, o.node_activation), w.node_output);
  }
  return {output.view(with_leading({output.size(-1)})), node_logits, mixture};
}

at::Tensor bernoulli_entropy(const at::Tensor& node_logits) {
  const auto entropy = [](const at::Tensor& probability) {
    return at::special_entr(probability.clamp(1e-6, 1 - 1e-6));
  };
  return at::add(entropy(node_logits.sigmoid()), entropy(node_logits.neg().sigmoid()));
}

}  // namespace torch_fff
