// The CUDA pipelines of fff::tree, run on the host, against the reference.
#include <ATen/ops/empty_like.h>

#include <limits>

#include "../../cuda/tree_forward.cuh"
#include "cuda_host.h"
#include "support.h"

namespace fff::test {
namespace {

using cuda::HostQueue;
using cuda::Order;

// Calls f with a value of the type that a tensor of `dtype` holds.
template <typename F>
void with_type(at::ScalarType dtype, const F& f) {
  switch (dtype) {
    case at::kDouble:
      return f(double());
    case at::kFloat:
      return f(float());
    case at::kBFloat16:
      return f(c10::BFloat16());
    default:
      return f(c10::Half());
  }
}

// A way to compute the forward pass.
struct Regime {
  const char* name;
  bool products;  // on the matrix units
  std::vector<at::ScalarType> dtypes;
  void (*run)(const TreeForward& p, at::ScalarType dtype, HostQueue& queue);
};

void PrintTo(const Regime& regime, std::ostream* os) {
  *os << regime.name;
}

// So many slabs as products, then a walk.
template <int kUsed>
void run_slabs(const TreeForward& p, at::ScalarType dtype, HostQueue& queue) {
  with_type(dtype, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (!std::is_same_v<T, double>) {
      const cuda::Slabs slabs(p.shape, cuda::kSlabLevels<T>, kUsed);
      cuda::pipeline::tree_forward_slabs<T>(p, slabs, queue);
      if (slabs.used < slabs.count) {
        cuda::pipeline::tree_forward_walk<T, 1, 1>(p, slabs.begin(slabs.used),
                                                   p.weights.node_output, 1, queue);
      }
    }
  });
}

template <int kWarps, int kLevels>
void run_walk(const TreeForward& p, at::ScalarType dtype, HostQueue& queue) {
  with_type(dtype, [&](auto zero) {
    cuda::pipeline::tree_forward_walk<decltype(zero), kWarps, kLevels>(p, 0, false, 3, queue);
  });
}

// The way that is chosen, in pieces.
void run_chosen(const TreeForward& p, at::ScalarType dtype, HostQueue& queue) {
  with_type(dtype, [&](auto zero) { cuda::pipeline::tree_forward<decltype(zero)>(p, queue, 300); });
}

class CudaTreeForward : public testing::TestWithParam<Regime> {
 protected:
  static TreeOutputs run(const TreeCase& c, const TreeArguments& a, Order order,
                         bool routes_only = false) {
    const at::ScalarType dtype = a.x.scalar_type();
    const auto undefined = [](at::IntArrayRef shape, at::ScalarType type) {
      return at::empty(shape, type).fill_(77);
    };
    const TreeOutputs y = {undefined({c.tokens, c.output_width}, sum_type(c, a.x)),
                           undefined({c.tokens, c.trees, c.levels}, accumulation_type(dtype)),
                           undefined({c.tokens, c.trees}, at::kLong)};
    TreeForward p = params_of(c, a);
    p.output = routes_only ? nullptr : y.output.data_ptr();
    p.output_dtype = dtype_of(y.output);
    p.scores = y.scores.data_ptr();
    p.leaf = y.leaf.data_ptr<int64_t>();
    p.allow_tf32 = true;
    static unsigned seed = 0;
    HostQueue queue(order, ++seed);
    GetParam().run(p, dtype, queue);
    return y;
  }

  // Factors of products on the matrix units have the inputs' type, tf32 for floats.
  static double tolerance_of(at::ScalarType dtype) {
    const bool rounds_gates = GetParam().products && dtype != at::kDouble;
    return rounds_gates ? dtype == at::kBFloat16 ? 1e-2 : 2e-3 : tolerance(dtype);
  }

  static void expect_reference(const TreeCase& c, const TreeArguments& a) {
    SCOPED_TRACE(c);
    const TreeOutputs want = run_tree(the_reference(), c, a);
    for (const at::ScalarType dtype : GetParam().dtypes) {
      SCOPED_TRACE(dtype);
      const TreeOutputs got = run(c, a.to(dtype), Order::kRandom);
      expect_equal("scores", got.scores, want.scores);
      expect_equal("leaf", got.leaf, want.leaf);
      expect_within(tolerance_of(dtype), "output", got.output, want.output);
    }
  }
};

const std::vector<at::ScalarType> kAll(std::begin(kDtypes), std::end(kDtypes));

INSTANTIATE_TEST_SUITE_P(
    , CudaTreeForward,
    testing::Values(Regime{"slabs", true, {at::kFloat, at::kBFloat16, at::kHalf}, run_slabs<99>},
                    Regime{"slab_and_walk", true, {at::kFloat, at::kBFloat16}, run_slabs<1>},
                    Regime{"walk", false, kAll, run_walk<1, 1>},
                    Regime{"walk_ahead", false, {at::kFloat}, run_walk<16, 3>},
                    Regime{"walk_ahead_of_wide_rows", false, {at::kHalf}, run_walk<16, 2>},
                    Regime{"chosen", true, {at::kDouble, at::kBFloat16}, run_chosen}),
    testing::PrintToStringParamName());

const std::vector<TreeCase> kCases = {
    // One slab: neuron trees of 5 and 6 levels, rows that are and are not aligned.
    {.levels = 1, .leaf_width = 0, .tokens = 1, .input_width = 1, .output_width = 1},
    {.levels = 5, .leaf_width = 0, .tokens = 100, .input_width = 70, .output_width = 33},
    {.levels = 6, .leaf_width = 0, .tokens = 65, .input_width = 264, .output_width = 136},
    {.levels = 4, .leaf_width = 0, .tokens = 70, .trees = 3, .noise = true, .tie_right = false},
    // Two and three slabs.
    {.levels = 7, .leaf_width = 0, .tokens = 300, .input_width = 33, .output_width = 70},
    {.levels = 8, .leaf_width = 0, .tokens = 90, .trees = 2, .node_bias = false, .noise = true},
    {.levels = 12, .leaf_width = 0, .tokens = 130, .input_width = 8, .output_width = 8},
    {.levels = 13, .leaf_width = 0, .tokens = 20, .input_width = 3, .output_width = 3},
    // Leaf networks: several leaves in a tile, one, and a part of one.
    {.levels = 0, .leaf_width = 3, .tokens = 70},
    {.levels = 3, .leaf_width = 2, .tokens = 7, .b1 = false, .b2 = false, .leaf_scale = true},
    {.levels = 4, .leaf_width = 9, .tokens = 150, .input_width = 33, .trees = 3},
    {.levels = 3, .leaf_width = 33, .tokens = 80, .output_width = 130},
    {.levels = 2, .leaf_width = 70, .tokens = 80, .input_width = 64, .trees = 2},
    {.levels = 7, .leaf_width = 1, .tokens = 100, .noise = true, .leaf_scale = true},
    // Both.
    {.levels = 2, .leaf_width = 2, .tokens = 70, .trees = 2, .node_output = true},
    {.levels = 8, .leaf_width = 40, .tokens = 70, .node_output = true, .noise = true},
    // Nothing to do.
    {.levels = 7, .leaf_width = 2, .tokens = 0},
    {.levels = 3, .leaf_width = 0, .tokens = 5, .output_width = 0},
    {.levels = 3, .leaf_width = 2, .tokens = 5, .input_width = 0},
};

TEST_P(CudaTreeForward, MatchesReference) {
  int i = 0;
  for (TreeCase c : kCases) {
    c.activation = kActivations[i++ % std::size(kActivations)];
    expect_reference(c, make_arguments(c));
  }
}

TEST_P(CudaTreeForward, OrderOfThreadsDoesNotMatter) {
  const TreeCase c = {.levels = 7,
                      .leaf_width = 2,
                      .tokens = 300,
                      .input_width = 150,
                      .output_width = 10,
                      .node_output = true};
  const TreeArguments a = make_arguments(c, &Random::normal);
  for (const at::ScalarType dtype : GetParam().dtypes) {
    SCOPED_TRACE(dtype);
    const TreeArguments own = a.to(dtype);
    const TreeOutputs want = run(c, own, Order::kForward);
    for (const Order order : {Order::kReverse, Order::kRandom}) {
      const TreeOutputs got = run(c, own, order);
      EXPECT_TRUE(got.scores.equal(want.scores));
      EXPECT_TRUE(got.leaf.equal(want.leaf));
      EXPECT_TRUE(got.output.equal(want.output));
    }
  }
}

TEST_P(CudaTreeForward, OneLeafTakesAll) {
  const TreeCase c = {.levels = 8, .leaf_width = 3, .tokens = 300, .trees = 2, .node_output = true};
  TreeArguments a = make_arguments(c);
  send_right(a, c);
  expect_reference(c, a);
}

TEST_P(CudaTreeForward, WildTokensKeepToThemselves) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  const TreeCase c = {.levels = 8, .leaf_width = 2, .tokens = 70, .node_output = true};
  TreeArguments a = make_arguments(c);
  a.x.select(0, 3).fill_(NAN);
  a.x.select(0, 10).fill_(kInf);
  a.x.select(0, 11).fill_(-kInf);
  expect_reference(c, a);
}

TEST_P(CudaTreeForward, RoutesOnly) {
  const TreeCase c = {.levels = 8, .leaf_width = 2, .tokens = 70};
  const TreeArguments a = make_arguments(c);
  const TreeOutputs want = run_tree(the_reference(), c, a);
  for (const at::ScalarType dtype : GetParam().dtypes) {
    const TreeOutputs got = run(c, a.to(dtype), Order::kRandom, true);
    expect_equal("scores", got.scores, want.scores);
    expect_equal("leaf", got.leaf, want.leaf);
    expect_equal("output", got.output, at::empty_like(got.output).fill_(77));
  }
}

}  // namespace
}  // namespace fff::test
