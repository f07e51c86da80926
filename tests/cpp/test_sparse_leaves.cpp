// fff::sparse_leaves, its gradient, and the choice of its pairs, against the reference.
#include "row_pairs.h"
#include "sparse_leaves.h"
#include "support.h"

namespace fff::test {
namespace {

class SparseLeavesTest : public ImplementationTest {};

INSTANTIATE_TEST_SUITE_P(, SparseLeavesTest, testing::ValuesIn(implementations()),
                         testing::PrintToStringParamName());

constexpr double kPrune = 0.25;

struct LeavesCase {
  int64_t tokens = 7;
  int64_t trees = 1;
  int64_t leaves = 8;
  int64_t leaf_width = 3;
  int64_t input_width = 16;
  int64_t output_width = 16;
  bool b1 = true;
  bool b2 = true;
  Activation activation = Activation::kGelu;
};

std::ostream& operator<<(std::ostream& os, const LeavesCase& c) {
  return os << c.tokens << " tokens, " << c.trees << " x " << c.leaves << " leaves of "
            << c.leaf_width << ", " << c.input_width << " -> " << c.output_width << ", b1 " << c.b1
            << ", b2 " << c.b2 << ", " << name_of(c.activation);
}

struct LeavesArguments {
  at::Tensor x, mixture, w1, w2, grad_output;
  OptionalTensor b1, b2;

  LeavesArguments to(at::ScalarType dtype) const {
    const auto cast = [&](const OptionalTensor& t) {
      return t ? OptionalTensor(t->to(dtype)) : std::nullopt;
    };
    return {x.to(dtype),           mixture.to(dtype), w1.to(dtype), w2.to(dtype),
            grad_output.to(dtype), cast(b1),          cast(b2)};
  }
};

// Numbers that are exact in every dtype; the mixture's are multiples of 1/8 of either sign, many of
// them equal to kPrune.
LeavesArguments make_arguments(const LeavesCase& c) {
  Random random(1);
  const int64_t leaves = c.trees * c.leaves;
  return {.x = random.grid({c.tokens, c.input_width}),
          .mixture = random.grid({c.tokens, c.trees, c.leaves}),
          .w1 = random.grid({leaves, c.leaf_width, c.input_width}),
          .w2 = random.grid({leaves, c.leaf_width, c.output_width}),
          .grad_output = random.grid({c.tokens, c.output_width}),
          .b1 = c.b1 ? OptionalTensor(random.grid({leaves, c.leaf_width})) : std::nullopt,
          .b2 = c.b2 ? OptionalTensor(random.grid({leaves, c.output_width})) : std::nullopt};
}

struct LeavesResult {
  at::Tensor output;
  std::array<at::Tensor, 6> gradients;
};

constexpr const char* kLeavesGradientNames[] = {"x", "mixture", "w1", "b1", "w2", "b2"};

LeavesResult run_leaves(const Implementation& by, const LeavesCase& c, const LeavesArguments& a) {
  if (!by.kernels) {
    const char* activation = name_of(c.activation);
    return {sparse_leaves(a.x, a.mixture, a.w1, a.b1, a.w2, a.b2, kPrune, activation),
            std::apply([](const auto&... t) { return std::array<at::Tensor, 6>{t...}; },
                       sparse_leaves_backward(a.grad_output, a.x, a.mixture, a.w1, a.b1, a.w2, a.b2,
                                              kPrune, activation, {true, true}))};
  }
  const at::ScalarType acc = accumulation_type(a.x.scalar_type());
  const auto zeros_like = [&](const OptionalTensor& t, at::ScalarType dtype) {
    return at::zeros(t ? t->sizes() : at::IntArrayRef{0}, dtype);
  };
  const LeavesResult result = {
      at::zeros({c.tokens, c.output_width}, acc),
      {zeros_like(a.x, acc), zeros_like(a.mixture, a.x.scalar_type()), zeros_like(a.w1, acc),
       zeros_like(a.b1, acc), zeros_like(a.w2, acc), zeros_like(a.b2, acc)}};
  for (size_t weight = 2; weight < result.gradients.size(); ++weight) {
    result.gradients[weight].fill_(by.name == the_reference().name ? 0 : NAN);
  }
  const auto pointer = [](const at::Tensor& t) { return t.numel() > 0 ? t.data_ptr() : nullptr; };
  const RowPairs pairs = kept_pairs(a.mixture, kPrune);
  SparseLeaves p = {};
  p.shape.tokens = c.tokens;
  p.shape.trees = c.trees;
  p.shape.leaf_width = c.leaf_width;
  p.shape.input_width = c.input_width;
  p.shape.output_width = c.output_width;
  p.dtype = dtype_of(a.x);
  p.activation = c.activation;
  p.weights.w1 = a.w1.data_ptr();
  p.weights.b1 = data_or_null(a.b1);
  p.weights.w2 = a.w2.data_ptr();
  p.weights.b2 = data_or_null(a.b2);
  p.x = a.x.data_ptr();
  p.mixture = a.mixture.data_ptr();
  p.leaves = c.trees * c.leaves;
  p.tokens = pairs.tokens.data();
  p.pair_count = static_cast<int64_t>(pairs.tokens.size());
  p.runs = pairs.runs.data();
  p.run_count = static_cast<int64_t>(pairs.runs.size());
  p.output = result.output.data_ptr();
  by.kernels->sparse_leaves(p);
  p.grad_output = a.grad_output.data_ptr();
  const auto& [x, mixture, w1, b1, w2, b2] = result.gradients;
  p.grad_x = pointer(x);
  p.grad_mixture = pointer(mixture);
  p.grad_w1 = pointer(w1);
  p.grad_b1 = pointer(b1);
  p.grad_w2 = pointer(w2);
  p.grad_b2 = pointer(b2);
  by.kernels->sparse_leaves_backward(p);
  return result;
}

std::vector<LeavesCase> leaves_cases() {
  std::vector<LeavesCase> cases;
  for (const int64_t leaf_width : {1, 2, 5, 9}) {
    for (const int64_t leaves : {1, 8, 32}) {
      const bool odd = leaf_width % 2;
      cases.push_back({.tokens = 33,
                       .trees = odd ? 1 : 3,
                       .leaves = leaves,
                       .leaf_width = leaf_width,
                       .input_width = 33,
                       .output_width = 70,
                       .b1 = leaves != 8,
                       .b2 = odd});
    }
  }
  for (int64_t width = 1; width <= 66; ++width) {  // every remainder of a vector, on both sides
    cases.push_back({.input_width = width, .output_width = 67 - width});
  }
  for (const Activation activation : kActivations) {
    cases.push_back({.activation = activation});
  }
  // Runs that are cut, and two blocks of tokens.
  cases.push_back({.tokens = 1100, .trees = 2, .leaves = 2, .input_width = 3, .output_width = 5});
  return cases;
}

TEST_P(SparseLeavesTest, MatchesReference) {
  for (const LeavesCase& c : leaves_cases()) {
    const LeavesArguments exact = make_arguments(c);
    const LeavesResult want = run_leaves(the_reference(), c, exact);
    for (const at::ScalarType dtype : kDtypes) {
      SCOPED_TRACE(testing::Message() << c << ", " << dtype);
      const LeavesResult got = run_leaves(GetParam(), c, exact.to(dtype));
      expect_close("output", got.output, want.output);
      for (size_t i = 0; i < want.gradients.size(); ++i) {
        expect_close(kLeavesGradientNames[i], got.gradients[i], want.gradients[i]);
      }
    }
  }
}

TEST_P(SparseLeavesTest, IsTheSameWithAnyThreads) {
  const LeavesCase c = {.tokens = 300, .trees = 2, .input_width = 130, .output_width = 200};
  const LeavesArguments a = make_arguments(c).to(at::kFloat);
  expect_same_with_any_threads([&] {
    const LeavesResult r = run_leaves(GetParam(), c, a);
    std::vector<at::Tensor> all(r.gradients.begin(), r.gradients.end());
    all.push_back(r.output);
    return all;
  });
}

TEST(SparseLeaves, WantsOnlyWhatTheMaskSays) {
  const LeavesCase c;
  const LeavesArguments a = make_arguments(c).to(at::kFloat);
  const LeavesResult all = run_leaves({"operators", std::nullopt}, c, a);
  for (const bool of_x : {false, true}) {
    for (const bool of_leaves : {false, true}) {
      const auto some =
          sparse_leaves_backward(a.grad_output, a.x, a.mixture, a.w1, a.b1, a.w2, a.b2, kPrune,
                                 name_of(c.activation), {of_x, of_leaves});
      const auto& [x, mixture, w1, b1, w2, b2] = some;
      const at::Tensor none = at::empty({0}, at::kFloat);
      expect_equal("x", x, of_x ? all.gradients[0] : none);
      expect_equal("mixture", mixture, all.gradients[1]);
      expect_equal("w1", w1, of_leaves ? all.gradients[2] : none);
      expect_equal("b1", b1, of_leaves ? all.gradients[3] : none);
      expect_equal("w2", w2, of_leaves ? all.gradients[4] : none);
      expect_equal("b2", b2, of_leaves ? all.gradients[5] : none);
    }
  }
}

// Every pair that counts is there once, in a run of its leaf, and no other is.
void expect_pairs(const at::Tensor& mixture, double prune) {
  const int64_t tokens = mixture.size(0), trees = mixture.size(1), leaves = mixture.size(2);
  const RowPairs pairs = kept_pairs(mixture, prune);
  std::vector<int> seen(mixture.numel());
  int64_t at = 0;
  for (const RowRun& run : pairs.runs) {
    ASSERT_EQ(run.begin, at);
    ASSERT_GE(run.count, 1);
    ASSERT_LE(run.count, RowRun::kMostPairs);
    for (; at < run.begin + run.count; ++at) {
      ++seen[pairs.tokens[at] * trees * leaves + run.row];
    }
  }
  ASSERT_EQ(at, static_cast<int64_t>(pairs.tokens.size()));
  const at::Tensor wide = mixture.to(at::kDouble);
  for (int64_t row = 0; row < tokens * trees; ++row) {
    const double* weights = wide.const_data_ptr<double>() + row * leaves;
    const bool any = std::any_of(weights, weights + leaves, [&](double w) { return !(w < prune); });
    const double least = any ? prune : *std::max_element(weights, weights + leaves);
    for (int64_t i = 0; i < leaves; ++i) {
      ASSERT_EQ(seen[row * leaves + i], !(weights[i] < least)) << "row " << row << ", leaf " << i;
    }
  }
}

TEST(RowPairs, AreThoseThatCount) {
  Random random(1);
  for (const int64_t tokens : {0, 1, 33, 2500}) {
    for (const int64_t trees : {1, 3}) {
      for (const int64_t leaves : {1, 2, 16}) {
        at::Tensor mixture = random.grid({tokens, trees, leaves});
        if (tokens > 5) {
          mixture.select(0, 5).fill_(NAN);
        }
        for (const double prune : {-1.0, 0.0, 0.25, 0.75, 1.0, 2.0}) {
          for (const at::ScalarType dtype : kDtypes) {
            SCOPED_TRACE(testing::Message() << tokens << " tokens, " << trees << " x " << leaves
                                            << " leaves, " << prune << ", " << dtype);
            expect_pairs(mixture.to(dtype), prune);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace fff::test
