// fff::sparse_linear_backward against the reference, below and above the share of zeros from which
// it computes matrix products.
#include "sparse_linear.h"

#include "row_pairs.h"
#include "support.h"

namespace fff::test {
namespace {

class SparseLinearTest : public ImplementationTest {};

INSTANTIATE_TEST_SUITE_P(, SparseLinearTest, testing::ValuesIn(implementations()),
                         testing::PrintToStringParamName());

using Gradients = std::tuple<at::Tensor, at::Tensor>;

Gradients run_sparse_linear(const Implementation& by, const at::Tensor& g, const at::Tensor& x,
                            const at::Tensor& weight) {
  if (!by.kernels) {
    return sparse_linear_backward(g, x, weight, {true, true});
  }
  const at::Tensor grad_x = at::empty(x.sizes(), x.options());
  const at::Tensor grad_weight = at::zeros(weight.sizes(), accumulation_type(x.scalar_type()));
  const RowPairs pairs = nonzero_pairs(g);
  by.kernels->sparse_linear_backward({.tokens = g.size(0),
                                      .rows = g.size(1),
                                      .width = x.size(1),
                                      .dtype = dtype_of(x),
                                      .grad_output = g.data_ptr(),
                                      .x = x.data_ptr(),
                                      .weight = weight.data_ptr(),
                                      .pair_tokens = pairs.tokens.data(),
                                      .runs = pairs.runs.data(),
                                      .run_count = static_cast<int64_t>(pairs.runs.size()),
                                      .grad_x = grad_x.data_ptr(),
                                      .grad_weight = grad_weight.data_ptr()});
  return {grad_x, grad_weight};
}

// Multiples of 1/8, one of `one_in` not zero; the first token's are all zero.
at::Tensor sparse(Random& random, int64_t tokens, int64_t rows, int64_t one_in) {
  const at::Tensor g = random.grid({tokens, rows});
  for (int64_t i = 0; i < g.numel(); ++i) {
    g.data_ptr<double>()[i] *= i >= rows && i % one_in == 0;
  }
  return g;
}

TEST_P(SparseLinearTest, MatchesReference) {
  Random random(1);
  for (const int64_t tokens : {1, 7, 33, 1100}) {
    for (const int64_t rows : {1, 7, 63}) {
      for (const int64_t width : {1, 16, 70, 200}) {
        for (const int64_t one_in : {1, 11}) {
          const at::Tensor g = sparse(random, tokens, rows, one_in);
          const at::Tensor x = random.grid({tokens, width}), weight = random.grid({rows, width});
          const auto [want_x, want_weight] = run_sparse_linear(the_reference(), g, x, weight);
          for (const at::ScalarType dtype : kDtypes) {
            SCOPED_TRACE(testing::Message() << tokens << " tokens, " << rows << " rows of " << width
                                            << ", one in " << one_in << ", " << dtype);
            const auto [got_x, got_weight] =
                run_sparse_linear(GetParam(), g.to(dtype), x.to(dtype), weight.to(dtype));
            expect_close("x", got_x, want_x);
            expect_close("weight", got_weight, want_weight);
          }
        }
      }
    }
  }
}

TEST_P(SparseLinearTest, IsTheSameWithAnyThreads) {
  Random random(1);
  const at::Tensor g = sparse(random, 300, 63, 11).to(at::kFloat);
  const at::Tensor x = random.normal({300, 200}).to(at::kFloat);
  const at::Tensor weight = random.normal({63, 200}).to(at::kFloat);
  expect_same_with_any_threads([&] {
    const auto [grad_x, grad_weight] = run_sparse_linear(GetParam(), g, x, weight);
    return std::vector<at::Tensor>{grad_x, grad_weight};
  });
}

TEST(SparseLinear, TakesZeroTokensAndRowsAndWantsOnlyWhatTheMaskSays) {
  for (const int64_t tokens : {0, 5}) {
    for (const int64_t rows : {0, 3}) {
      const at::Tensor g = at::zeros({tokens, rows}, at::kFloat);
      const at::Tensor x = at::zeros({tokens, 4}, at::kFloat);
      const at::Tensor weight = at::zeros({rows, 4}, at::kFloat);
      const at::Tensor none = at::empty({0}, at::kFloat);
      for (const bool of_x : {false, true}) {
        for (const bool of_weight : {false, true}) {
          const auto [grad_x, grad_weight] =
              sparse_linear_backward(g, x, weight, {of_x, of_weight});
          expect_equal("x", grad_x, of_x ? x : none);
          expect_equal("weight", grad_weight, of_weight ? weight : none);
        }
      }
    }
  }
}

TEST(SparseLinear, NamesTheMistake) {
  const auto f32 = [](at::IntArrayRef shape) { return at::zeros(shape, at::kFloat); };
  const auto call = [](const at::Tensor& g, const at::Tensor& x, const at::Tensor& weight) {
    sparse_linear_backward(g, x, weight, {true, true});
  };
  const std::string op = "fff::sparse_linear_backward: ";
  expect_error([&] { call(f32({5, 3}), f32({}), f32({3, 4})); }, {op + "x must have shape"});
  expect_error([&] { call(f32({5, 3}), f32({5, 4}), f32({3, 5})); },
               {op + "weight must have shape [rows, 4], got [3, 5]"});
  expect_error([&] { call(f32({5, 4}), f32({5, 4}), f32({3, 4})); },
               {op + "grad_output must have shape [5, 3], got [5, 4]"});
  expect_error([&] { call(f32({5, 3}), f32({5, 4}), f32({3, 4}).to(at::kDouble)); },
               {op + "weight must be Float, got Double"});
}

}  // namespace
}  // namespace fff::test
