// Every wrong argument gets an error that names the operator, the argument, what was expected and
// what was got.
#include <ATen/core/dispatch/Dispatcher.h>

#include "gated_activation.h"
#include "leaf_mixture.h"
#include "support.h"

namespace fff::test {
namespace {

at::Tensor f32(at::IntArrayRef shape) {
  return at::zeros(shape, at::kFloat);
}

at::Tensor meta(at::IntArrayRef shape) {
  return at::empty(shape, at::TensorOptions(at::kFloat).device(at::kMeta));
}

// A correct call of fff::tree and fff::tree_backward, to be spoilt in one place.
struct Call {
  TreeCase c = {.levels = 2,
                .tokens = 5,
                .input_width = 3,
                .output_width = 4,
                .node_output = true,
                .noise = true,
                .leaf_scale = true,
                .alternates = true,
                .grad_scores = true};
  TreeArguments a = make_arguments(c).to(at::kFloat);
  std::string node_activation = "gelu", leaf_activation = "relu";
  TreeOutputs y = call_tree(c, a);

  void forward() const {
    tree(a.x, a.node_weight, a.node_bias, a.node_output, a.w1, a.b1, a.w2, a.b2, a.noise,
         a.leaf_scale, a.alternates, c.trees, true, node_activation, leaf_activation, true, 1,
         c.min_slope, false);
  }
  void backward() const {
    tree_backward(a.grad_output, a.grad_scores, y.scores, y.leaf, a.x, a.node_weight, a.node_bias,
                  a.node_output, a.w1, a.b1, a.w2, a.b2, a.noise, a.leaf_scale, a.alternates,
                  c.trees, true, node_activation, leaf_activation, true, 1, c.min_slope,
                  {true, true, true});
  }
};

struct Mistake {
  void (*make)(Call&);
  std::vector<std::string> parts;  // of the message, beside the operator
};

TEST(Errors, TreeAndItsGradientNameTheMistake) {
  const Mistake mistakes[] = {
      {[](Call& m) { m.a.x = f32({}); }, {": x must have shape [..., input_width]", "scalar"}},
      {[](Call& m) { m.a.x = m.a.x.to(at::kInt); }, {": x must be float32, float64", "got Int"}},
      {[](Call& m) { m.a.x = f32({5, 7}); },
       {": x must have last dimension 3", "got shape [5, 7]"}},
      {[](Call& m) { m.a.node_weight = f32({3}); },
       {": node_weight must have shape [trees * nodes, input_width]", "got [3]"}},
      {[](Call& m) { m.a.node_weight = f32({4, 3}); },
       {": node_weight must have trees * (2^levels - 1) rows", "trees = 1", "got 4"}},
      {[](Call& m) { m.a.node_weight = m.a.node_weight.to(at::kHalf); },
       {": node_weight must be Float", "got Half"}},
      {[](Call& m) { m.a.node_weight = meta({3, 3}); },
       {": node_weight must be on cpu like the first tensor", "got meta"}},
      {[](Call& m) { m.c.trees = 0; }, {": trees must be at least 1", "got 0"}},
      {[](Call& m) { m.c.trees = 2; }, {": node_weight must have", "trees = 2", "got 3"}},
      {[](Call& m) { m.a.node_bias = f32({4}); }, {": node_bias must have shape [3]", "got [4]"}},
      {[](Call& m) { m.a.node_bias = m.a.node_bias->to(at::kDouble); },
       {": node_bias must be Float", "got Double"}},
      {[](Call& m) { m.a.node_output = f32({3, 5}); },
       {": node_output must have shape [3, 4]", "got [3, 5]"}},
      {[](Call& m) { m.a.w2 = std::nullopt; }, {": w1 and w2 must come together", "got only w1"}},
      {[](Call& m) { m.a.w1 = std::nullopt; }, {": w1 and w2 must come together", "got only w2"}},
      {[](Call& m) { m.a.w1 = f32({4, 3}); },
       {": w1 must have shape [trees * leaves, leaf_width, input_width]", "got [4, 3]"}},
      {[](Call& m) { m.a.w1 = f32({4, 0, 3}); }, {": w1 must have shape", "got [4, 0, 3]"}},
      {[](Call& m) { m.a.w1 = f32({8, 2, 3}); },
       {": w1 must have shape [4, 2, 3]", "got [8, 2, 3]"}},
      {[](Call& m) { m.a.w2 = f32({4, 4}); },
       {": w2 must have shape [trees * leaves, leaf_width, output_width]", "got [4, 4]"}},
      {[](Call& m) { m.a.w2 = f32({4, 1, 4}); },
       {": w2 must have shape [4, 2, 4]", "got [4, 1, 4]"}},
      {[](Call& m) { m.a.b1 = f32({4, 3}); }, {": b1 must have shape [4, 2]", "got [4, 3]"}},
      {[](Call& m) { m.a.b2 = f32({3, 4}); }, {": b2 must have shape [4, 4]", "got [3, 4]"}},
      {[](Call& m) { m.a.noise = f32({5, 1, 3}); },
       {": noise must have shape [5, 1, 2]", "got [5, 1, 3]"}},
      {[](Call& m) { m.a.noise = m.a.noise->to(at::kDouble); },
       {": noise must be Float", "got Double"}},
      {[](Call& m) { m.a.leaf_scale = f32({5, 2}); },
       {": leaf_scale must have shape [5, 1, 2]", "got [5, 2]"}},
      {[](Call& m) { m.a.alternates = f32({5, 2, 1}); },
       {": alternates must have shape [5, 1, 2]", "got [5, 2, 1]"}},
      {[](Call& m) { m.a.alternates = m.a.alternates->to(at::kHalf); },
       {": alternates must be Float", "got Half"}},
      {[](Call& m) { m.c.min_slope = -0.5; }, {": min_slope must be in [0, 1]", "got -0.5"}},
      {[](Call& m) { m.c.min_slope = NAN; }, {": min_slope must be in [0, 1]", "got nan"}},
      {[](Call& m) { m.node_activation = "tanh"; },
       {": node_activation must be one of 'identity'", "got 'tanh'"}},
      {[](Call& m) { m.leaf_activation = "GELU"; },
       {": leaf_activation must be one of 'identity'", "got 'GELU'"}},
      {[](Call& m) { m.a.w1 = m.a.w2 = std::nullopt; },
       {": b1, b2 and leaf_scale must be absent without w1 and w2"}},
      {[](Call& m) { m.a.w1 = m.a.w2 = m.a.node_output = std::nullopt; },
       {": node_output or w1 and w2 must be given", "got neither"}},
      {[](Call& m) {
         m.a = {.x = f32({5, 3}), .node_weight = f32({0, 3}), .node_output = f32({0, 4})};
       },
       {": a tree without leaf networks must have at least one node", "got none"}},
      {[](Call& m) {
         m.a = {.x = f32({5, 3}), .node_weight = f32({3, 3}), .node_output = f32({})};
       },
       {": node_output must have shape [trees * nodes, output_width]", "got shape []"}},
  };
  for (const Mistake& mistake : mistakes) {
    Call call;
    mistake.make(call);
    std::vector<std::string> parts = mistake.parts;
    parts.push_back("fff::tree:");
    expect_error([&] { call.forward(); }, parts);
    parts.back() = "fff::tree_backward:";
    expect_error([&] { call.backward(); }, parts);
  }
}

TEST(Errors, TreeBackwardNamesItsOwnArguments) {
  const Mistake mistakes[] = {
      {[](Call& m) { m.a.grad_output = f32({5, 3}); },
       {": grad_output must have shape [5, 4]", "got [5, 3]"}},
      {[](Call& m) { m.a.grad_output = m.a.grad_output->to(at::kHalf); },
       {": grad_output must be Float", "got Half"}},
      {[](Call& m) { m.a.grad_scores = f32({5, 1, 1}); },
       {": grad_scores must have shape [5, 1, 2]", "got [5, 1, 1]"}},
      {[](Call& m) { m.y.scores = f32({5, 2}); },
       {": scores must have shape [5, 1, 2]", "got [5, 2]"}},
      {[](Call& m) { m.y.leaf = m.y.leaf.to(at::kInt); }, {": leaf must be Long", "got Int"}},
      {[](Call& m) { m.y.leaf = m.y.leaf.view({5}); },
       {": leaf must have shape [5, 1]", "got [5]"}},
  };
  for (const Mistake& mistake : mistakes) {
    Call call;
    mistake.make(call);
    std::vector<std::string> parts = mistake.parts;
    parts.push_back("fff::tree_backward:");
    expect_error([&] { call.backward(); }, parts);
  }
}

TEST(Errors, RowSparseGradientsAreForTheCPU) {
  const at::Tensor x = meta({5, 3}), scores = meta({5, 1, 2});
  expect_error(
      [&] {
        tree_backward_rows({}, {}, scores, scores, x, x, {}, {}, {}, {}, {}, {}, {}, {}, {}, 1,
                           true, "relu", "relu", true, 1, 0, {true, true, true});
      },
      {"fff::tree_backward_rows: x must be on the CPU for row_sparse_grad", "got meta"});
}

TEST(Errors, DescendNamesTheMistake) {
  const at::Tensor x = f32({5, 3}), w = f32({3, 3});
  expect_error([&] { descend(x, w, f32({2}), {}, 1, true); },
               {"fff::descend: node_bias must have shape [3]", "got [2]"});
  expect_error([&] { descend(x, w, {}, f32({5, 2}), 1, true); },
               {"fff::descend: noise must have shape [5, 1, 2]", "got [5, 2]"});
  expect_error([&] { descend(f32({5, 4}), w, {}, {}, 1, true); },
               {"fff::descend: x must have last dimension 3", "got shape [5, 4]"});
  expect_error([&] { descend(x, w, {}, {}, -1, true); },
               {"fff::descend: trees must be at least 1", "got -1"});
  const at::Tensor deep = f32({1, 0}).expand({(int64_t(1) << 48) - 1, 0});
  expect_error([&] { descend(f32({5, 0}), deep, {}, {}, 1, true); },
               {"fff::descend: node_weight must have fewer than 48 levels"});
}

TEST(Errors, LeafMixtureNamesTheMistake) {
  expect_error([] { leaf_mixture(f32({})); },
               {"fff::leaf_mixture: node_logits must have shape [..., 2^depth - 1]", "scalar"});
  expect_error(
      [] { leaf_mixture(f32({5, 4})); },
      {"fff::leaf_mixture: node_logits must have 2^depth - 1 columns", "got shape [5, 4]"});
  expect_error([] { leaf_mixture(f32({5, 3}).to(at::kLong)); },
               {"fff::leaf_mixture: node_logits must be float32", "got Long"});
  const at::Tensor z = f32({5, 3}), m = f32({5, 4});
  expect_error([&] { leaf_mixture_backward(z, z, m); },
               {"fff::leaf_mixture_backward: grad_mixture must have shape [5, 4]", "got [5, 3]"});
  expect_error([&] { leaf_mixture_backward(m, z, z); },
               {"fff::leaf_mixture_backward: mixture must have shape [5, 4]", "got [5, 3]"});
  expect_error([&] { leaf_mixture_backward(m.to(at::kDouble), z, m); },
               {"fff::leaf_mixture_backward: grad_mixture must be Float", "got Double"});
}

TEST(Errors, GatedActivationNamesTheMistake) {
  const at::Tensor pre = f32({5, 8}), mixture = f32({5, 4});
  expect_error([&] { gated_activation(pre, f32({5, 3}), "relu"); },
               {"fff::gated_activation: pre must have shape [..., leaves * leaf_width]", "[5, 3]",
                "got [5, 8]"});
  expect_error([&] { gated_activation(pre, f32({4, 4}), "relu"); },
               {"fff::gated_activation: pre must have shape", "[4, 4]", "got [5, 8]"});
  expect_error([&] { gated_activation(pre, f32({4}), "relu"); },
               {"fff::gated_activation: pre must have shape", "[4]", "got [5, 8]"});
  expect_error([&] { gated_activation(f32({}), f32({}), "relu"); },
               {"fff::gated_activation: pre must have shape", "got []"});
  expect_error([&] { gated_activation(pre, f32({5, 0}), "relu"); },
               {"fff::gated_activation: pre must have shape", "[5, 0]", "got [5, 8]"});
  expect_error([&] { gated_activation(pre, mixture.to(at::kHalf), "relu"); },
               {"fff::gated_activation: mixture must be Float", "got Half"});
  expect_error([&] { gated_activation(pre, meta({5, 4}), "relu"); },
               {"fff::gated_activation: mixture must be on cpu", "got meta"});
  expect_error([&] { gated_activation(pre, mixture, "elu"); },
               {"fff::gated_activation: activation must be one of 'identity'", "got 'elu'"});
  expect_error([&] { gated_activation(pre.to(at::kInt), mixture, "relu"); },
               {"fff::gated_activation: pre must be float32", "got Int"});
  expect_error(
      [&] { gated_activation_backward(mixture, pre, mixture, "relu"); },
      {"fff::gated_activation_backward: grad_output must have shape [5, 8]", "got [5, 4]"});
}

TEST(Errors, UnsupportedDeviceIsNamed) {
  expect_error([] { leaf_mixture(meta({5, 3})); },
               {"fff::leaf_mixture: tensors must be on a device that this build", "got meta"});
}

// descend is not differentiable; its scores say so when a gradient is asked of them.
TEST(Errors, DescendRefusesToBeDifferentiated) {
  const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fff::descend", "").typed<decltype(descend)>();
  const at::Tensor x = f32({5, 3}).requires_grad_(true);
  const auto [scores, leaf] = op.call(x, f32({3, 3}), {}, {}, 1, true);
  expect_error([&] { scores.sum().backward(); },
               {"derivative for fff::descend is not implemented"});
}

}  // namespace
}  // namespace fff::test
