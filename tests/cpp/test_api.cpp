// The interface for C++ programs: functions through the dispatcher, modules, weights from Python.
#include <ATen/Functions.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/jit/serialization/pickle.h>
#include <torch_fff/torch_fff.h>

#include <cstdio>
#include <fstream>

#include "support.h"

namespace fff::test {
namespace {

using torch_fff::FFF;
using torch_fff::FFFOptions;
using torch_fff::UltraFFF;
using torch_fff::UltraFFFOptions;

using reference::TokenInTree;

at::Tensor f32(at::IntArrayRef shape) {
  return at::zeros(shape, at::kFloat);
}

at::Tensor value_or_undefined(const OptionalTensor& t) {
  return t.value_or(at::Tensor());
}

torch_fff::TreeWeights weights_of(const TreeArguments& a) {
  return {a.node_weight,
          value_or_undefined(a.node_bias),
          value_or_undefined(a.node_output),
          value_or_undefined(a.w1),
          value_or_undefined(a.b1),
          value_or_undefined(a.w2),
          value_or_undefined(a.b2)};
}

const TreeCase kTree = {
    .levels = 3, .tokens = 9, .trees = 2, .node_output = true, .noise = true, .leaf_scale = true};

TEST(Api, TreeIsTheOperatorWithItsGradients) {
  TreeArguments a = make_arguments(kTree);
  const TreeOutputs want = call_tree(kTree, a);
  const Gradients want_gradients = call_tree_backward(kTree, a, want);
  torch_fff::TreeWeights w = weights_of(a);
  std::vector<at::Tensor> inputs = {a.x,  w.node_weight, w.node_bias, w.node_output,
                                    w.w1, w.b1,          w.w2,        w.b2};
  for (at::Tensor& t : inputs) {
    t.requires_grad_(true);
  }
  const auto got = torch_fff::tree(a.x, w,
                                   {.noise = *a.noise,
                                    .leaf_scale = *a.leaf_scale,
                                    .trees = kTree.trees,
                                    .tie_right = kTree.tie_right,
                                    .node_activation = name_of(kTree.node_activation()),
                                    .leaf_activation = name_of(kTree.activation),
                                    .straight_through = kTree.straight_through,
                                    .slope = kTree.slope});
  expect_equal("output", got.output, want.output);
  expect_equal("scores", got.scores, want.scores);
  expect_equal("leaf", got.leaf, want.leaf);
  got.output.backward(*a.grad_output);
  for (size_t i = 0; i < inputs.size(); ++i) {
    expect_equal(kGradientNames[i], inputs[i].grad(), want_gradients[i]);
  }
}

TEST(Api, DescendIsTheOperator) {
  const TreeArguments a = make_arguments(kTree);
  const auto [want_scores, want_leaf] =
      descend(a.x, a.node_weight, a.node_bias, a.noise, kTree.trees, false);
  const auto [scores, leaf] =
      torch_fff::descend(a.x, a.node_weight, *a.node_bias,
                         {.noise = *a.noise, .trees = kTree.trees, .tie_right = false});
  expect_equal("scores", scores, want_scores);
  expect_equal("leaf", leaf, want_leaf);
}

TEST(Api, AutocastApplies) {
  TreeCase c = kTree;
  c.noise = c.leaf_scale = false;
  const TreeArguments a = make_arguments(c).to(at::kFloat);
  at::autocast::set_autocast_enabled(at::kCPU, true);
  const auto y = torch_fff::tree(a.x, weights_of(a), {.trees = c.trees});
  at::autocast::set_autocast_enabled(at::kCPU, false);
  at::autocast::clear_cache();
  EXPECT_EQ(y.output.scalar_type(), at::kBFloat16);
}

// y += weight * what the subtree of `node` gives when every decision mixes its two sides.
void mix(const TokenInTree& t, int64_t node, int level, double weight, double* y) {
  const auto& s = t.s;
  if (level == s.levels) {
    std::vector<double> leaf(s.output_width);
    t.leaf_network(node - t.nodes(), leaf.data());
    reference::add(y, weight, leaf.data(), s.output_width);
    return;
  }
  const double score = t.score(node);
  if (t.p.weights.node_output) {
    reference::add(y, weight * reference::value_of(t.p.node_activation, score),
                   reference::doubles(t.p.weights.node_output) + t.node_row(node) * s.output_width,
                   s.output_width);
  }
  const double right = reference::logistic(score);
  mix(t, 2 * node + 1, level + 1, weight * (1 - right), y);
  mix(t, 2 * node + 2, level + 1, weight * right, y);
}

TEST(Api, SoftTreeMixesAllLeaves) {
  for (const TreeCase& c :
       {TreeCase{.levels = 3, .tokens = 6, .trees = 2, .node_output = true},
        TreeCase{.levels = 0, .tokens = 6, .node_bias = false, .b1 = false, .b2 = false},
        TreeCase{.levels = 2, .leaf_width = 0, .tokens = 6}, TreeCase{.levels = 4, .tokens = 0}}) {
    SCOPED_TRACE(c);
    const TreeArguments a = make_arguments(c);
    const TreeForward p = params_of(c, a);
    at::Tensor want = at::zeros({c.tokens, c.output_width}, at::kDouble);
    for (int64_t token = 0; token < c.tokens; ++token) {
      for (int64_t tree = 0; tree < c.trees; ++tree) {
        double* y = want.data_ptr<double>() + token * c.output_width;
        mix(reference::TokenInTree(p, token, tree), 0, 0, 1, y);
      }
    }
    const auto got = torch_fff::soft_tree(a.x, weights_of(a),
                                          {.trees = c.trees,
                                           .node_activation = name_of(c.node_activation()),
                                           .leaf_activation = name_of(c.activation)});
    expect_close("output", got.output, want);
    expect_close("mixture", got.mixture.sum(-1), at::ones({c.tokens, c.trees}, at::kDouble));
    EXPECT_EQ(got.node_logits.sizes(), at::IntArrayRef({c.tokens, c.trees, (1 << c.levels) - 1}));
  }
}

TEST(Api, EntropyOfDecisions) {
  const at::Tensor logits = at::linspace(-3, 3, 7, at::kDouble);
  const at::Tensor c = logits.sigmoid();
  const at::Tensor want = -(c * c.log() + (1 - c) * (1 - c).log());
  expect_close("entropy", torch_fff::bernoulli_entropy(logits), want);
  const at::Tensor hard = torch_fff::bernoulli_entropy(at::full({1}, 100.0, at::kDouble));
  EXPECT_NEAR(hard.item<double>(), -1e-6 * std::log(1e-6), 1e-5);
}

FFF make_fff() {
  return FFF(FFFOptions{.input_width = 6,
                        .leaf_width = 3,
                        .output_width = 5,
                        .depth = 3,
                        .activation = "gelu",
                        .parallel_size = 2,
                        .node_output = true});
}

TEST(Api, FFFIsSoftInTrainingAndHardInEvaluation) {
  FFF layer = make_fff();
  const at::Tensor x = at::randn({4, 2, 6});
  const torch_fff::TreeWeights w = {
      layer->node_weights, layer->node_biases, layer->node_outputs, layer->w1, layer->b1,
      layer->w2,           layer->b2};
  const at::Tensor soft =
      torch_fff::soft_tree(x, w, {.trees = 2, .node_activation = "gelu", .leaf_activation = "gelu"})
          .output;
  const at::Tensor hard =
      torch_fff::tree(x, w, {.trees = 2, .node_activation = "gelu", .leaf_activation = "gelu"})
          .output;
  EXPECT_TRUE(layer->forward(x).equal(soft));
  layer->eval();
  EXPECT_TRUE(layer->forward(x).equal(hard));
  EXPECT_TRUE(layer->soft(x).output.equal(soft));
  layer->train();
  layer->options.train_hardened = true;
  EXPECT_TRUE(layer->forward(x).equal(hard));
}

TEST(Api, AllParametersOfTheLayersLearn) {
  const at::Tensor x = at::randn({64, 6});
  const auto learns = [&](auto layer) {
    layer->forward(x).square().sum().backward();
    for (const auto& item : layer->named_parameters()) {
      ASSERT_TRUE(item.value().grad().defined()) << item.key();
      EXPECT_GT(item.value().grad().abs().sum().template item<float>(), 0) << item.key();
    }
  };
  learns(make_fff());
  FFF hard = make_fff();
  hard->options.train_hardened = true;
  learns(hard);
  learns(UltraFFF(UltraFFFOptions{.input_width = 6, .output_width = 5, .depth = 2}));
}

TEST(Api, UltraFFFIsATreeOfNeurons) {
  UltraFFF layer(UltraFFFOptions{
      .input_width = 6, .output_width = 5, .depth = 2, .parallel_size = 3, .bias = false});
  EXPECT_EQ(layer->named_parameters().keys(),
            (std::vector<std::string>{"node_weights", "node_outputs"}));
  EXPECT_EQ(layer->node_weights.sizes(), at::IntArrayRef({21, 6}));
  const at::Tensor x = at::randn({4, 6});
  const auto want =
      torch_fff::tree(x, {.node_weight = layer->node_weights, .node_output = layer->node_outputs},
                      {.trees = 3, .tie_right = false, .node_activation = "gelu"});
  EXPECT_TRUE(layer->forward(x).equal(want.output));
}

TEST(Api, OutputBiasIsAddedToTheSumOfTheTrees) {
  const UltraFFFOptions options{
      .input_width = 6, .output_width = 5, .depth = 2, .parallel_size = 3, .output_bias = true};
  UltraFFF layer(options);
  EXPECT_EQ(
      layer->named_parameters().keys(),
      (std::vector<std::string>{"node_weights", "node_biases", "node_outputs", "output_bias"}));
  const at::Tensor x = at::randn({4, 6});
  const at::Tensor without = layer->forward(x);
  const at::Tensor bias = at::randn({5});
  layer->output_bias.detach().copy_(bias);
  EXPECT_TRUE(layer->forward(x).equal(without + bias));
  layer->to(at::kBFloat16);
  EXPECT_EQ(layer->forward(x.to(at::kBFloat16)).scalar_type(), at::kBFloat16);
}

TEST(Api, ModulesCanBeClonedAndConverted) {
  FFF layer = make_fff();
  const auto copy = std::dynamic_pointer_cast<torch_fff::FFFImpl>(layer->clone());
  ASSERT_TRUE(copy);
  EXPECT_TRUE(copy->w1.equal(layer->w1));
  EXPECT_NE(copy->w1.data_ptr(), layer->w1.data_ptr());
  layer->to(at::kBFloat16);
  EXPECT_EQ(layer->forward(at::randn({4, 6}, at::kBFloat16)).scalar_type(), at::kBFloat16);
}

// A file as Python's torch.save writes it, gone at the end of the test.
class SavedState {
 public:
  explicit SavedState(const c10::IValue& content) {
    const std::vector<char> bytes = torch::jit::pickle_save(content);
    std::ofstream(path_, std::ios::binary).write(bytes.data(), bytes.size());
  }
  ~SavedState() { std::remove(path_.c_str()); }
  const std::string& path() const { return path_; }

 private:
  std::string path_ = testing::TempDir() + "torch_fff_state.pt";
};

c10::Dict<std::string, at::Tensor> state_of(const torch::nn::Module& module) {
  c10::Dict<std::string, at::Tensor> state;
  for (const auto& item : module.named_parameters()) {
    state.insert(item.key(), item.value().detach());
  }
  return state;
}

TEST(Api, LoadsAStateDict) {
  const FFF from = make_fff();
  FFF to = make_fff();
  EXPECT_FALSE(to->w1.equal(from->w1));
  torch_fff::load_state_dict(*to, SavedState(state_of(*from)).path());
  for (const auto& item : from->named_parameters()) {
    EXPECT_TRUE(to->named_parameters()[item.key()].equal(item.value())) << item.key();
  }
  EXPECT_TRUE(to->w1.requires_grad());
}

TEST(Api, AStateDictThatDoesNotFitIsAnErrorAndChangesNothing) {
  FFF layer = make_fff();
  auto state = state_of(*make_fff());
  ASSERT_EQ(state.erase("b2"), 1);
  state.insert_or_assign("w1", at::zeros({2, 3, 6}));
  state.insert("master_logit", at::zeros({}));
  const at::Tensor before = layer->node_weights.clone();
  const SavedState saved(state);
  expect_error([&] { torch_fff::load_state_dict(*layer, saved.path()); },
               {"load_state_dict: ", "b2: missing", "w1: expected shape [16, 3, 6], got [2, 3, 6]",
                "master_logit: unexpected"});
  EXPECT_TRUE(layer->node_weights.equal(before));
  const SavedState list(std::vector<at::Tensor>{at::zeros({2})});
  expect_error([&] { torch_fff::load_state_dict(*layer, list.path()); },
               {"load_state_dict: path: expected what Python's torch.save(dict("});
  expect_error([&] { torch_fff::load_state_dict(*layer, "/nowhere/state.pt"); },
               {"load_state_dict: path: expected a readable file, got '/nowhere/state.pt'"});
}

TEST(Api, OptionsThatAreWrongAreNamed) {
  expect_error([] { FFF(FFFOptions{.input_width = 6}); },
               {"FFF: leaf_width: expected an integer >= 1, got 0"});
  expect_error([] { UltraFFF(UltraFFFOptions{.input_width = 6, .output_width = 5, .depth = -1}); },
               {"UltraFFF: depth: expected an integer in [0, ", "got -1"});
  expect_error([] { UltraFFF(UltraFFFOptions{.input_width = 6, .output_width = 5, .slope = 0}); },
               {"UltraFFF: slope: expected a finite number > 0, got 0"});
  UltraFFF layer(UltraFFFOptions{.input_width = 6, .output_width = 5, .activation = "elu"});
  expect_error([&] { layer->forward(f32({4, 6})); },
               {"node_activation must be one of 'identity'", "got 'elu'"});
}

TEST(Api, SoftTreeNamesTheMistake) {
  const TreeCase c = {.levels = 2, .tokens = 5, .input_width = 3, .output_width = 4};
  const auto spoilt = [&](void (*spoil)(torch_fff::TreeWeights&), int64_t trees = 1) {
    const TreeArguments a = make_arguments(c);
    torch_fff::TreeWeights w = weights_of(a);
    spoil(w);
    torch_fff::soft_tree(a.x, w, {.trees = trees});
  };
  using Weights = torch_fff::TreeWeights;
  expect_error([&] { spoilt([](Weights&) {}, 0); }, {"torch_fff::soft_tree: trees must be", "0"});
  expect_error([&] { spoilt([](Weights& w) { w.node_weight = f32({4, 3}); }); },
               {"torch_fff::soft_tree: node_weight must have trees * (2^levels - 1) rows"});
  expect_error([&] { spoilt([](Weights& w) { w.node_weight = f32({3, 7}); }); },
               {"torch_fff::soft_tree: x must have shape [..., 7]", "got [5, 3]"});
  expect_error([&] { spoilt([](Weights& w) { w.w2.reset(); }); },
               {"torch_fff::soft_tree: w1 and w2 must come together", "only w1"});
  expect_error([&] { spoilt([](Weights& w) { w.b1 = f32({4, 3}); }); },
               {"torch_fff::soft_tree: b1 must have shape [4, 2]", "got [4, 3]"});
  expect_error([&] { spoilt([](Weights& w) { w = {.node_weight = w.node_weight}; }); },
               {"torch_fff::soft_tree: node_output of at least one node", "got neither"});
}

}  // namespace
}  // namespace fff::test
