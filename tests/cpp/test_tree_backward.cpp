// fff::tree_backward, the kernels of every instruction set, and what autograd makes of them.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd.h>

#include "dense_forest.h"
#include "support.h"

namespace fff::test {
namespace {

class TreeBackwardTest : public ImplementationTest {};

INSTANTIATE_TEST_SUITE_P(, TreeBackwardTest, testing::ValuesIn(implementations()),
                         testing::PrintToStringParamName());

void expect_all_close(const Gradients& got, const Gradients& want) {
  for (size_t i = 0; i < got.size(); ++i) {
    expect_close(kGradientNames[i], got[i], want[i]);
  }
}

void expect_reference(const Implementation& by, const TreeCase& c, const TreeArguments& a) {
  SCOPED_TRACE(c);
  const Gradients want = run_tree_backward(the_reference(), c, a, run_tree(the_reference(), c, a));
  for (const at::ScalarType dtype : kDtypes) {
    SCOPED_TRACE(dtype);
    const TreeArguments b = a.to(dtype);
    expect_all_close(run_tree_backward(by, c, b, run_tree(by, c, b)), want);
  }
}

TEST_P(TreeBackwardTest, MatchesReference) {
  for (const TreeCase& c : tree_cases()) {
    expect_reference(GetParam(), c, make_arguments(c));
  }
}

// To the bit: the same sums in the same order.
TEST_P(TreeBackwardTest, VisitedRowsAreAllThatDenseGradientsHold) {
  for (const TreeCase& c : tree_cases()) {
    SCOPED_TRACE(c);
    const TreeArguments a = make_arguments(c).to(at::kFloat);
    const TreeOutputs y = run_tree(GetParam(), c, a);
    const VisitedRows visited =
        visited_rows(params_of(c, a).shape, y.leaf.const_data_ptr<int64_t>());
    const Gradients dense = run_tree_backward(GetParam(), c, a, y);
    const Gradients rows = run_tree_backward(GetParam(), c, a, y, &visited);
    expect_close("x", rows[0], dense[0]);
    for (size_t i = 1; i < rows.size(); ++i) {
      const std::vector<int64_t>& ids = i < 4 ? visited.nodes : visited.leaves;
      at::Tensor all = at::zeros(dense[i].sizes(), dense[i].options());
      if (dense[i].numel() > 0) {
        ASSERT_EQ(rows[i].size(0), static_cast<int64_t>(ids.size())) << kGradientNames[i];
      }
      for (int64_t row = 0; dense[i].numel() > 0 && row < rows[i].size(0); ++row) {
        all.select(0, ids[row]).copy_(rows[i].select(0, row));
      }
      expect_close(kGradientNames[i], all, dense[i]);  // shallow forests take other products
    }
  }
}

TEST_P(TreeBackwardTest, OneLeafTakesAll) {
  for (const TreeCase& c :
       {TreeCase{.levels = 3, .tokens = 300, .trees = 3},
        TreeCase{.levels = 4, .leaf_width = 0, .tokens = 2100, .grad_scores = true}}) {
    TreeArguments a = make_arguments(c);
    send_right(a, c);
    expect_reference(GetParam(), c, a);
  }
}

// Large enough for dense products, which only the operators choose.
TEST(TreeBackward, ShallowForestsMatchReference) {
  for (const TreeCase& c :
       {TreeCase{.levels = 1, .leaf_width = 0, .tokens = 3, .input_width = 200, .trees = 4000},
        TreeCase{.levels = 3,
                 .leaf_width = 0,
                 .tokens = 20,
                 .input_width = 200,
                 .trees = 80,
                 .noise = true,
                 .straight_through = false,
                 .grad_scores = true}}) {
    const Implementation operators = {"operators", std::nullopt};
    const TreeArguments a = make_arguments(c);
    const TreeArguments f32 = a.to(at::kFloat);
    ASSERT_TRUE(suits_dense_forest(params_of(c, f32), f32.x, c.straight_through));
    expect_reference(operators, c, a);
    TreeOutputs y = call_tree(c, f32);
    const Gradients want = call_tree_backward(c, f32, y);
    y.leaf.add_(int64_t(1) << 40);  // its low bits count
    expect_all_close(call_tree_backward(c, f32, y), want);
  }
}

TEST_P(TreeBackwardTest, WildLeavesStayInside) {
  const TreeCase c = kWildLeaves;
  const TreeArguments a = make_arguments(c).to(at::kFloat);
  const TreeOutputs y = run_tree(GetParam(), c, a);
  expect_leaves_stay_inside(y, [&] { return run_tree_backward(GetParam(), c, a, y); });
}

// NaN and infinite tokens reach their own gradient and the rows of their own path, nothing else.
TEST_P(TreeBackwardTest, WildTokensKeepToThemselves) {
  for (const TreeCase& c : {TreeCase{.levels = 5, .tokens = 33, .node_output = true},
                            TreeCase{.levels = 5, .leaf_width = 0, .tokens = 33, .trees = 3}}) {
    SCOPED_TRACE(c);
    TreeArguments a = make_arguments(c).to(at::kFloat);
    a.grad_output->select(0, 5).zero_();
    const Gradients clean = run_tree_backward(GetParam(), c, a, run_tree(GetParam(), c, a));
    for (const double value : {double(NAN), double(INFINITY), -double(INFINITY)}) {
      a.x.select(0, 5).fill_(value);
      const TreeOutputs y = run_tree(GetParam(), c, a);
      const Gradients got = run_tree_backward(GetParam(), c, a, y);
      expect_close("x before", got[0].slice(0, 0, 5), clean[0].slice(0, 0, 5));
      expect_close("x after", got[0].slice(0, 6), clean[0].slice(0, 6));
      // Of the first tree's rows 1 and 2, the root's children, one is off the wild token's path.
      const bool right =
          y.leaf.data_ptr<int64_t>()[5 * c.trees] >> (params_of(c, a).shape.decisions - 1);
      const int64_t off_path = right ? 1 : 2;
      expect_close("node_weight", got[1].select(0, off_path), clean[1].select(0, off_path));
    }
  }
}

TEST_P(TreeBackwardTest, NumberOfThreadsDoesNotMatter) {
  for (const int64_t leaf_width : {0, 2}) {
    const TreeCase c = {.levels = 8,
                        .leaf_width = leaf_width,
                        .tokens = 2100,
                        .input_width = 70,
                        .output_width = 130,
                        .trees = 3,
                        .activation = Activation::kGelu};
    const TreeArguments a = make_arguments(c, &Random::normal).to(at::kFloat);
    const TreeOutputs y = run_tree(GetParam(), c, a);
    expect_same_with_any_threads([&] { return run_tree_backward(GetParam(), c, a, y); });
  }
}

TEST(TreeBackward, ReturnsWhatTheMaskWants) {
  const TreeCase c = {.trees = 3, .node_output = true};
  const TreeArguments a = make_arguments(c);
  const TreeOutputs y = call_tree(c, a);
  const Gradients all = call_tree_backward(c, a, y);
  for (int bits = 0; bits < 8; ++bits) {
    const std::array<bool, 3> mask = {(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0};
    const Gradients got = call_tree_backward(c, a, y, mask);
    for (size_t i = 0; i < got.size(); ++i) {
      const bool wanted = mask[i == 0 ? 0 : i < 4 ? 1 : 2];
      expect_equal(kGradientNames[i], got[i], wanted ? all[i] : at::empty({0}, at::kDouble));
    }
  }
}

TEST(TreeBackward, TakesEitherIncomingGradientOrNeither) {
  const TreeCase c = {.node_output = true, .grad_scores = true};
  const TreeArguments both = make_arguments(c);
  const TreeOutputs y = call_tree(c, both);
  for (const bool with_output : {false, true}) {
    for (const bool with_scores : {false, true}) {
      TreeArguments zeroed = both, absent = both;
      if (!with_output) {
        zeroed.grad_output = at::zeros(both.grad_output->sizes(), at::kDouble);
        absent.grad_output = std::nullopt;
      }
      if (!with_scores) {
        zeroed.grad_scores = at::zeros(both.grad_scores->sizes(), at::kDouble);
        absent.grad_scores = std::nullopt;
      }
      expect_all_close(call_tree_backward(c, absent, y),
                       run_tree_backward(the_reference(), c, zeroed, y));
    }
  }
}

TEST(TreeBackward, TakesLeadingDimensionsAndAnyStrides) {
  const TreeCase c = {.tokens = 6, .trees = 3, .noise = true, .grad_scores = true};
  const TreeArguments a = make_arguments(c);
  const Gradients want = call_tree_backward(c, a, call_tree(c, a));
  TreeArguments b = a;
  b.x = a.x.view({2, 3, 16}).transpose(0, 1).contiguous().transpose(0, 1);
  b.noise = a.noise->view({2, 3, 3, 3});
  b.grad_output = a.grad_output->t().contiguous().t().view({2, 3, 16});
  b.grad_scores = a.grad_scores->view({2, 3, 3, 3});
  ASSERT_FALSE(b.grad_output->is_contiguous());
  const Gradients got = call_tree_backward(c, b, call_tree(c, b));
  expect_equal("x", got[0], want[0].view({2, 3, 16}));
  for (size_t i = 1; i < got.size(); ++i) {
    expect_equal(kGradientNames[i], got[i], want[i]);
  }
}

TEST(TreeBackward, TakesZeroTokensAndZeroWidths) {
  const TreeCase none = {.tokens = 0, .trees = 3};
  const TreeArguments a = make_arguments(none);
  const Gradients g = call_tree_backward(none, a, call_tree(none, a));
  expect_equal("x", g[0], at::zeros({0, 16}, at::kDouble));
  expect_equal("w1", g[4], at::zeros({24, 2, 16}, at::kDouble));
  for (const TreeCase& c :
       {TreeCase{.input_width = 0, .node_output = true}, TreeCase{.output_width = 0}}) {
    expect_reference({"operators", std::nullopt}, c, make_arguments(c));
  }
}

// --- through the dispatcher ----------------------------------------------------------------------

TreeOutputs dispatch_tree(const TreeCase& c, const TreeArguments& a, bool row_sparse_grad = false) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fff::tree", "").typed<decltype(tree)>();
  const auto [output, scores, leaf] =
      op.call(a.x, a.node_weight, a.node_bias, a.node_output, a.w1, a.b1, a.w2, a.b2, a.noise,
              a.leaf_scale, a.alternates, c.trees, c.tie_right, name_of(c.node_activation()),
              name_of(c.activation), c.straight_through, c.slope, c.min_slope, row_sparse_grad);
  return {output, scores, leaf};
}

// The differentiable arguments, in the order of their gradients; absent ones undefined.
Gradients inputs_of(const TreeArguments& a) {
  return {a.x,
          a.node_weight,
          a.node_bias.value_or(at::Tensor()),
          a.node_output.value_or(at::Tensor()),
          a.w1.value_or(at::Tensor()),
          a.b1.value_or(at::Tensor()),
          a.w2.value_or(at::Tensor()),
          a.b2.value_or(at::Tensor())};
}

std::vector<TreeCase> autograd_cases() {
  return {{.node_output = true, .noise = true, .leaf_scale = true, .grad_scores = true},
          {.alternates = true, .grad_scores = true, .min_slope = 0.6},
          {.node_bias = false, .b1 = false, .b2 = false, .grad_scores = true},
          {.leaf_width = 0, .trees = 3, .straight_through = false, .grad_scores = true}};
}

TEST(TreeAutograd, DifferentiatesEveryInputTogetherAndAlone) {
  for (const TreeCase& c : autograd_cases()) {
    SCOPED_TRACE(c);
    const TreeArguments a = make_arguments(c);
    const Gradients want =
        run_tree_backward(the_reference(), c, a, run_tree(the_reference(), c, a));
    const Gradients inputs = inputs_of(a);
    const auto expect_gradients_of = [&](const std::vector<size_t>& chosen) {
      std::vector<at::Tensor> variables;
      for (const size_t i : chosen) {
        variables.push_back(inputs[i]);
        variables.back().requires_grad_(true);
      }
      const TreeOutputs y = dispatch_tree(c, a);
      EXPECT_FALSE(y.leaf.requires_grad());
      const auto got =
          torch::autograd::grad({y.output, y.scores}, variables, {*a.grad_output, *a.grad_scores});
      for (size_t i = 0; i < chosen.size(); ++i) {
        expect_close(kGradientNames[chosen[i]], got[i], want[chosen[i]]);
        variables[i].requires_grad_(false);
      }
    };
    std::vector<size_t> present;
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (inputs[i].defined()) {
        present.push_back(i);
        expect_gradients_of({i});
      }
    }
    expect_gradients_of(present);
  }
}

TEST(TreeAutograd, RowSparseGradientsAreCoalescedAndEqualTheDenseOnes) {
  for (const TreeCase& c : autograd_cases()) {
    SCOPED_TRACE(c);
    const TreeArguments a = make_arguments(c);
    std::vector<at::Tensor> variables;
    for (const at::Tensor& t : inputs_of(a)) {
      if (t.defined()) {
        variables.push_back(t);
        variables.back().requires_grad_(true);
      }
    }
    const auto gradients = [&](bool row_sparse_grad) {
      const TreeOutputs y = dispatch_tree(c, a, row_sparse_grad);
      return torch::autograd::grad({y.output, y.scores}, variables,
                                   {*a.grad_output, *a.grad_scores});
    };
    const auto dense = gradients(false), sparse = gradients(true);
    EXPECT_TRUE(sparse[0].equal(dense[0]));
    for (size_t i = 1; i < dense.size(); ++i) {
      EXPECT_TRUE(sparse[i].is_sparse() && sparse[i].is_coalesced());
      EXPECT_EQ(sparse[i].sparse_dim(), 1);
      EXPECT_TRUE(sparse[i].to_dense().equal(dense[i]));
    }
  }
}

TEST(TreeAutograd, DifferentiatesTheScoresAlone) {
  const TreeCase c = {.grad_scores = true};
  TreeArguments a = make_arguments(c);
  TreeArguments zeroed = a;
  zeroed.grad_output = at::zeros(a.grad_output->sizes(), at::kDouble);
  const Gradients want =
      run_tree_backward(the_reference(), c, zeroed, run_tree(the_reference(), c, a));
  a.x.requires_grad_(true);
  const auto got = torch::autograd::grad({dispatch_tree(c, a).scores}, {a.x}, {*a.grad_scores});
  expect_close("x", got[0], want[0]);
}

TEST(TreeAutograd, RefusesDoubleBackward) {
  const TreeCase c;
  TreeArguments a = make_arguments(c);
  a.x.requires_grad_(true);
  const auto first = torch::autograd::grad({dispatch_tree(c, a).output}, {a.x}, {*a.grad_output},
                                           /*retain_graph=*/true, /*create_graph=*/true);
  expect_error([&] { torch::autograd::grad({first[0].sum()}, {a.x}); },
               {"derivative for fff::tree_backward is not implemented"});
}

}  // namespace
}  // namespace fff::test
