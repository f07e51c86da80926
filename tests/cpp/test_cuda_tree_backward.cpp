// The CUDA pipeline of fff::tree_backward on the matrix units, run on the host, against the
// reference.
#include <ATen/ops/isnan.h>

#include "../../cuda/tree_backward.cuh"
#include "cuda_host.h"
#include "support.h"

namespace fff::test {
namespace {

using cuda::HostQueue;
using cuda::Order;

// What is multiplied: numbers of the inputs' type, floats whole or rounded.
struct Numbers {
  const char* name;
  at::ScalarType dtype;
  double tolerance;
  size_t turn;  // 0 ... 3
  bool allow_tf32 = false;
};

void PrintTo(const Numbers& numbers, std::ostream* os) {
  *os << numbers.name;
}

// Calls f with a value of the type that `dtype` names.
template <typename F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat:
      return f(float());
    case DType::kBFloat16:
      return f(c10::BFloat16());
    default:
      return f(c10::Half());
  }
}

template <Order kOrder>
void run_slabs(const TreeBackward& p) {
  HostQueue queue(kOrder);
  with_type(p.forward.dtype, [&](auto zero) {
    cuda::pipeline::tree_backward_slabs<decltype(zero)>(p, false, queue);
  });
}

template <Order kOrder>
void run_slabs_of_tf32(const TreeBackward& p) {
  TreeBackward rounded = p;
  rounded.forward.allow_tf32 = true;
  run_slabs<kOrder>(rounded);
}

class CudaTreeBackward : public testing::TestWithParam<Numbers> {
 protected:
  template <Order kOrder = Order::kRandom>
  static Implementation slabs() {
    cpu::Kernels kernels = {};
    kernels.tree_backward = GetParam().allow_tf32 ? run_slabs_of_tf32<kOrder> : run_slabs<kOrder>;
    return {.name = "slabs", .kernels = kernels, .writes_whole = true};
  }

  static Gradients run(const TreeCase& c, const TreeArguments& a, const TreeOutputs& y,
                       const Implementation& by = slabs()) {
    const TreeOutputs own = {y.output, y.scores.to(at::kFloat), y.leaf};
    return run_tree_backward(by, c, a.to(GetParam().dtype), own);
  }

  static void expect_all(const Gradients& got, const Gradients& want) {
    for (size_t i = 0; i < got.size(); ++i) {
      expect_within(GetParam().tolerance, kGradientNames[i], got[i], want[i]);
    }
  }

  static void expect_reference(const TreeCase& c, const TreeArguments& a) {
    SCOPED_TRACE(c);
    const TreeOutputs y = run_tree(the_reference(), c, a);
    expect_all(run(c, a, y), run_tree_backward(the_reference(), c, a, y));
  }
};

INSTANTIATE_TEST_SUITE_P(, CudaTreeBackward,
                         testing::Values(Numbers{"float", at::kFloat, 1e-5, 0},
                                         Numbers{"tf32", at::kFloat, 2e-3, 1, true},
                                         Numbers{"half", at::kHalf, 2e-3, 2},
                                         Numbers{"bfloat16", at::kBFloat16, 1e-2, 3}),
                         testing::PrintToStringParamName());

const std::vector<TreeCase> kCases = {
    // One slab: neuron trees, rows that are and are not aligned.
    {.levels = 1, .leaf_width = 0, .tokens = 1, .input_width = 1, .output_width = 1},
    {.levels = 3, .leaf_width = 0, .straight_through = false},
    {.levels = 5, .leaf_width = 0, .tokens = 100, .input_width = 70, .output_width = 33},
    {.levels = 6, .leaf_width = 0, .tokens = 65, .input_width = 136, .output_width = 72},
    {.levels = 4,
     .leaf_width = 0,
     .tokens = 70,
     .trees = 3,
     .noise = true,
     .tie_right = false,
     .alternates = true,
     .grad_scores = true},
    // Two and three slabs.
    {.levels = 7, .leaf_width = 0, .tokens = 200, .input_width = 33, .output_width = 70},
    {.levels = 7, .leaf_width = 0, .tokens = 90, .straight_through = false},
    {.levels = 8, .leaf_width = 0, .tokens = 90, .trees = 2, .node_bias = false, .noise = true},
    {.levels = 9, .leaf_width = 0, .tokens = 200, .alternates = true, .min_slope = 0.6},
    {.levels = 13,
     .leaf_width = 0,
     .tokens = 20,
     .input_width = 3,
     .output_width = 3,
     .grad_scores = true},
    // Leaf networks: no nodes at all, several leaves in a tile, one, and a part of one.
    {.levels = 0, .leaf_width = 3, .tokens = 70},
    {.levels = 3, .leaf_width = 2, .tokens = 7, .b1 = false, .b2 = false, .leaf_scale = true},
    {.levels = 3, .leaf_width = 2, .tokens = 7, .straight_through = false},
    {.levels = 3, .leaf_width = 2, .tokens = 7, .straight_through = false, .grad_scores = true},
    {.levels = 4, .leaf_width = 9, .tokens = 150, .input_width = 33, .trees = 3},
    {.levels = 3, .leaf_width = 33, .tokens = 80, .output_width = 70, .alternates = true},
    {.levels = 2, .leaf_width = 70, .tokens = 80, .trees = 2, .leaf_scale = true},
    {.levels = 7, .leaf_width = 1, .tokens = 100, .noise = true, .leaf_scale = true},
    // Both.
    {.levels = 2, .leaf_width = 2, .tokens = 70, .trees = 2, .node_output = true},
    {.levels = 8, .leaf_width = 40, .tokens = 70, .node_output = true, .noise = true},
    // Nothing to do.
    {.levels = 7, .leaf_width = 2, .tokens = 0},
    {.levels = 3, .leaf_width = 0, .tokens = 5, .output_width = 0},
    {.levels = 3, .leaf_width = 2, .tokens = 5, .input_width = 0},
};

TEST_P(CudaTreeBackward, MatchesReference) {
  // By turns: what depends on the numbers does not depend on the case.
  for (size_t i = GetParam().turn; i < kCases.size(); i += 4) {
    TreeCase c = kCases[i];
    c.activation = kActivations[i % std::size(kActivations)];
    expect_reference(c, make_arguments(c));
  }
}

TEST_P(CudaTreeBackward, OrderOfThreadsDoesNotMatter) {
  const TreeCase c = {.levels = 7,
                      .leaf_width = 2,
                      .tokens = 40,
                      .input_width = 33,
                      .output_width = 10,
                      .node_output = true};
  const TreeArguments a = make_arguments(c);
  const TreeOutputs y = run_tree(the_reference(), c, a);
  const Gradients want = run(c, a, y);
  expect_all(want, run_tree_backward(the_reference(), c, a, y));
  for (const Implementation& by : {slabs<Order::kForward>(), slabs<Order::kReverse>()}) {
    const Gradients got = run(c, a, y, by);
    for (size_t i = 0; i < got.size(); ++i) {
      EXPECT_TRUE(got[i].equal(want[i])) << kGradientNames[i];
    }
  }
}

// More tokens than a block sums up at once.
TEST_P(CudaTreeBackward, OneLeafTakesAll) {
  for (const TreeCase& c :
       {TreeCase{.levels = 2, .tokens = 600, .trees = 2},
        TreeCase{.levels = 7, .leaf_width = 0, .tokens = 1100, .straight_through = false}}) {
    TreeArguments a = make_arguments(c);
    send_right(a, c);
    expect_reference(c, a);
  }
}

// Neighbours whose sums are in parts, one of which begins where the other's last range does.
TEST_P(CudaTreeBackward, GroupsOfSeveralRanges) {
  const TreeCase c = {.levels = 1,
                      .leaf_width = 33,
                      .tokens = 1400,
                      .input_width = 8,
                      .output_width = 3,
                      .straight_through = false};
  expect_reference(c, make_arguments(c));
}

// Calls for too many tokens are cut.
TEST_P(CudaTreeBackward, TokensInParts) {
  const TreeCase c = {.levels = 3,
                      .tokens = 150,
                      .trees = 2,
                      .node_output = true,
                      .noise = true,
                      .leaf_scale = true,
                      .alternates = true,
                      .grad_scores = true};
  const TreeArguments a = make_arguments(c);
  const TreeOutputs y = run_tree(the_reference(), c, a);
  Implementation parts = slabs();
  parts.kernels->tree_backward = [](const TreeBackward& all) {
    TreeBackward p = all;
    p.forward.allow_tf32 = GetParam().allow_tf32;
    HostQueue queue(Order::kRandom);
    with_type(p.forward.dtype,
              [&](auto zero) { cuda::pipeline::tree_backward<decltype(zero)>(p, queue, 2 * 70); });
  };
  expect_all(run(c, a, y, parts), run_tree_backward(the_reference(), c, a, y));
}

TEST_P(CudaTreeBackward, GradientsThatAreNotWantedAreLeftAlone) {
  static bool nodes;
  static void (*all)(const TreeBackward&);
  Implementation some = slabs();
  all = some.kernels->tree_backward;
  some.kernels->tree_backward = [](const TreeBackward& wanted) {
    TreeBackward p = wanted;
    if (nodes) {
      p.grad_x = p.grad_w1 = p.grad_b1 = p.grad_w2 = p.grad_b2 = nullptr;
    } else {
      p.grad_node_weight = p.grad_node_bias = p.grad_node_output = nullptr;
    }
    all(p);
  };
  const TreeCase c = {.levels = 3, .tokens = 70, .node_output = true};
  const TreeArguments a = make_arguments(c);
  const TreeOutputs y = run_tree(the_reference(), c, a);
  const Gradients want = run_tree_backward(the_reference(), c, a, y);
  for (const bool wanted : {true, false}) {
    nodes = wanted;
    const Gradients got = run(c, a, y, some);
    for (size_t i = nodes ? 1 : 0; i < got.size(); ++i) {
      const bool of_nodes = i >= 1 && i <= 3;
      if (of_nodes == nodes) {
        expect_within(GetParam().tolerance, kGradientNames[i], got[i], want[i]);
      } else {
        EXPECT_TRUE(got[i].isnan().all().item<bool>()) << kGradientNames[i];
      }
    }
  }
}

TEST_P(CudaTreeBackward, WildLeavesStayInside) {
  const TreeCase c = kWildLeaves;
  const TreeArguments a = make_arguments(c);
  const TreeOutputs y = run_tree(the_reference(), c, a);
  expect_leaves_stay_inside(y, [&] { return run(c, a, y); });
}

// NaN and infinite tokens reach their own gradient and the rows of the slabs on their own path.
TEST_P(CudaTreeBackward, WildTokensKeepToThemselves) {
  const TreeCase c = {.levels = 8, .leaf_width = 2, .tokens = 9, .node_output = true};
  TreeArguments a = make_arguments(c);
  a.grad_output->select(0, 5).zero_();
  const Gradients clean = run(c, a, run_tree(the_reference(), c, a));
  for (const double value : {double(NAN), double(INFINITY)}) {
    a.x.select(0, 5).fill_(value);
    const TreeOutputs y = run_tree(the_reference(), c, a);
    const Gradients got = run(c, a, y);
    EXPECT_TRUE(got[0].slice(0, 0, 5).equal(clean[0].slice(0, 0, 5)));
    EXPECT_TRUE(got[0].slice(0, 6).equal(clean[0].slice(0, 6)));
    // The slab of levels 4 ... 7 below a node of level 4 that the wild token does not reach.
    const int64_t wild = y.leaf.data_ptr<int64_t>()[5] >> 4;
    for (int64_t token = 0; token < c.tokens; ++token) {
      const int64_t node = y.leaf.data_ptr<int64_t>()[token] >> 4;
      if (node != wild) {
        for (const int i : {1, 3}) {
          EXPECT_TRUE(got[i].select(0, 15 + node).equal(clean[i].select(0, 15 + node)));
        }
      }
    }
  }
}

}  // namespace
}  // namespace fff::test
