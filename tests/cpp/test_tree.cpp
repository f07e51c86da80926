// fff::tree and fff::descend, and the kernels of every instruction set, against the reference.
#include <limits>

#include "support.h"

namespace fff::test {
namespace {

class TreeTest : public ImplementationTest {};

INSTANTIATE_TEST_SUITE_P(, TreeTest, testing::ValuesIn(implementations()),
                         testing::PrintToStringParamName());

void expect_reference(const Implementation& by, const TreeCase& c, const TreeArguments& a) {
  SCOPED_TRACE(c);
  const TreeOutputs want = run_tree(the_reference(), c, a);
  for (const at::ScalarType dtype : kDtypes) {
    SCOPED_TRACE(dtype);
    const TreeOutputs got = run_tree(by, c, a.to(dtype));
    expect_equal("scores", got.scores, want.scores);
    expect_equal("leaf", got.leaf, want.leaf);
    expect_close("output", got.output, want.output);
  }
}

TEST_P(TreeTest, MatchesReference) {
  for (const TreeCase& c : tree_cases()) {
    expect_reference(GetParam(), c, make_arguments(c));
  }
}

TEST_P(TreeTest, OneLeafTakesAll) {
  for (const TreeCase& c : {TreeCase{.levels = 3, .tokens = 300, .trees = 3},
                            TreeCase{.levels = 8, .leaf_width = 0, .tokens = 2100},
                            TreeCase{.levels = 8, .tokens = 2100, .node_output = true}}) {
    TreeArguments a = make_arguments(c);
    send_right(a, c);
    expect_reference(GetParam(), c, a);
  }
}

// A token that is NaN or infinite is lost, but still takes some path, and its neighbours do not
// notice.
TEST_P(TreeTest, WildTokensKeepToThemselves) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  for (const TreeCase& c : {TreeCase{.levels = 0, .tokens = 33},
                            TreeCase{.levels = 5, .tokens = 33, .node_output = true},
                            TreeCase{.levels = 8, .leaf_width = 0, .tokens = 300, .trees = 3}}) {
    TreeArguments a = make_arguments(c);
    a.x.select(0, 3).fill_(NAN);
    a.x.select(0, 10).fill_(kInf);
    a.x.select(0, 11).fill_(-kInf);
    a.x.select(0, 32).select(0, 0).fill_(kInf);
    expect_reference(GetParam(), c, a);
  }
}

TEST_P(TreeTest, NumberOfThreadsDoesNotMatter) {
  const TreeCase c = {
      .levels = 8, .tokens = 2100, .output_width = 70, .trees = 3, .activation = Activation::kGelu};
  const TreeArguments a = make_arguments(c, &Random::normal).to(at::kFloat);
  expect_same_with_any_threads([&] {
    const TreeOutputs y = run_tree(GetParam(), c, a);
    return std::array{y.output, y.scores, y.leaf};
  });
}

TEST(Tree, KeepsLeadingDimensions) {
  const TreeCase c = {.levels = 2, .tokens = 6, .trees = 3, .noise = true, .leaf_scale = true};
  TreeArguments a = make_arguments(c);
  const TreeOutputs want = call_tree(c, a);
  for (const std::vector<int64_t>& leading : {std::vector<int64_t>{2, 3}, {1, 6, 1}}) {
    const auto shaped = [&](const at::Tensor& t) {
      std::vector<int64_t> shape = leading;
      shape.insert(shape.end(), t.sizes().begin() + 1, t.sizes().end());
      return t.view(shape);
    };
    TreeArguments b = a;
    b.x = shaped(a.x);
    b.noise = shaped(*a.noise);
    b.leaf_scale = shaped(*a.leaf_scale);
    const TreeOutputs got = call_tree(c, b);
    expect_equal("output", got.output, shaped(want.output));
    expect_equal("scores", got.scores, shaped(want.scores));
    expect_equal("leaf", got.leaf, shaped(want.leaf));
  }
}

TEST(Tree, TakesOneTokenWithoutLeadingDimensions) {
  const TreeCase c = {.tokens = 1};
  TreeArguments a = make_arguments(c);
  const TreeOutputs want = call_tree(c, a);
  a.x = a.x.squeeze(0);
  const TreeOutputs got = call_tree(c, a);
  expect_equal("output", got.output, want.output.squeeze(0));
  expect_equal("scores", got.scores, want.scores.squeeze(0));
  expect_equal("leaf", got.leaf, want.leaf.squeeze(0));
}

// The same numbers, with the last two dimensions exchanged in memory.
at::Tensor strided(const at::Tensor& t) {
  return t.dim() < 2 ? t : t.transpose(-1, -2).contiguous().transpose(-1, -2);
}

TEST(Tree, TakesAnyStrides) {
  const TreeCase c = {.trees = 3, .node_output = true, .noise = true, .leaf_scale = true};
  TreeArguments a = make_arguments(c);
  const TreeOutputs want = call_tree(c, a);
  a.x = strided(a.x);
  a.node_weight = strided(a.node_weight);
  for (OptionalTensor* t : {&a.node_output, &a.w1, &a.b1, &a.w2, &a.b2, &a.noise, &a.leaf_scale}) {
    ASSERT_FALSE(strided(**t).is_contiguous());
    *t = strided(**t);
  }
  a.node_bias = a.node_bias->clone().as_strided({c.trees * 7}, {1});
  const TreeOutputs got = call_tree(c, a);
  expect_equal("output", got.output, want.output);
  expect_equal("scores", got.scores, want.scores);
  expect_equal("leaf", got.leaf, want.leaf);
}

TEST(Tree, TakesZeroTokensAndZeroWidths) {
  const TreeOutputs none = call_tree({.tokens = 0}, make_arguments({.tokens = 0}));
  EXPECT_EQ(none.output.sizes(), at::IntArrayRef({0, 16}));
  EXPECT_EQ(none.scores.sizes(), at::IntArrayRef({0, 1, 3}));
  EXPECT_EQ(none.leaf.sizes(), at::IntArrayRef({0, 1}));
  const TreeCase blind = {.input_width = 0, .node_output = true};
  expect_reference({"operators", std::nullopt}, blind, make_arguments(blind));
  const TreeCase mute = {.output_width = 0, .node_output = true};
  expect_reference({"operators", std::nullopt}, mute, make_arguments(mute));
}

TEST(Tree, ReturnsTheDtypesOfTheContract) {
  const TreeCase c = {.trees = 3};
  for (const at::ScalarType dtype : kDtypes) {
    const TreeOutputs y = call_tree(c, make_arguments(c).to(dtype));
    EXPECT_EQ(y.output.scalar_type(), dtype);
    EXPECT_EQ(y.scores.scalar_type(), dtype == at::kDouble ? at::kDouble : at::kFloat);
    EXPECT_EQ(y.leaf.scalar_type(), at::kLong);
  }
}

// descend takes the decisions of a tree with leaf networks, but computes only the routes.
TEST(Descend, TakesTheRoutesOfATree) {
  std::vector<TreeCase> cases = {{.levels = 8, .leaf_width = 1, .tokens = 2100, .trees = 3}};
  for (int levels = 0; levels <= 6; ++levels) {
    cases.push_back({.levels = levels,
                     .leaf_width = 1,
                     .trees = 1 + levels % 3,
                     .node_bias = levels % 2 == 0,
                     .noise = levels % 4 < 2,
                     .tie_right = levels % 3 > 0});
  }
  for (const TreeCase& c : cases) {
    SCOPED_TRACE(c);
    const TreeArguments exact = make_arguments(c);
    const TreeOutputs want = run_tree(the_reference(), c, exact);
    for (const at::ScalarType dtype : kDtypes) {
      const TreeArguments a = exact.to(dtype);
      const auto [scores, leaf] =
          descend(a.x, a.node_weight, a.node_bias, a.noise, c.trees, c.tie_right);
      expect_equal("scores", scores, want.scores);
      expect_equal("leaf", leaf, want.leaf);
    }
  }
}

}  // namespace
}  // namespace fff::test
