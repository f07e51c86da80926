// The CUDA kernels and pipelines, run on the host, against the CPU kernels.
//
// All numbers are small multiples of 1/4, so that scores are exact in every type and every order of
// summation: both sides must take the same routes, ties included.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <sstream>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../../cuda/gated_activation.cuh"
#include "../../cuda/leaf_mixture.cuh"
#include "../../cuda/path_gates.cuh"
#include "../../cuda/tree_backward.cuh"
#include "cpu/kernels.h"
#include "cuda_host.h"

namespace fff {
namespace {

using cuda::acc_t;
using cuda::HostQueue;
using cuda::kDType;

template <typename T>
constexpr double kTolerance = std::is_same_v<T, float>           ? 1e-5
                              : std::is_same_v<T, double>        ? 1e-12
                              : std::is_same_v<T, c10::BFloat16> ? 1e-2
                                                                 : 2e-3;

template <typename T>
void expect_close(const std::vector<T>& got, const std::vector<T>& expected, const char* name) {
  ASSERT_EQ(got.size(), expected.size());
  for (size_t i = 0; i < got.size(); ++i) {
    const double g = static_cast<double>(got[i]), e = static_cast<double>(expected[i]);
    const bool close = g == e || (std::isnan(g) && std::isnan(e)) ||
                       std::abs(g - e) <= kTolerance<T> * (1 + std::abs(e));
    ASSERT_TRUE(close) << name << "[" << i << "]: got " << g << ", expected " << e;
  }
}

std::mt19937 random_source(1);

template <typename T>
std::vector<T> random_values(int64_t count, bool present = true) {
  std::uniform_int_distribution<int> quarters(-4, 4);
  std::vector<T> values(present ? count : 0);
  for (T& v : values) {
    v = static_cast<T>(quarters(random_source) / 4.0f);
  }
  return values;
}

template <typename T>
T* data_or_null(std::vector<T>& values) {
  return values.empty() ? nullptr : values.data();
}

struct TreeCase {
  int levels;
  int64_t leaf_width;  // 0: no leaf networks
  bool node_output;
  int64_t trees = 1;
  int64_t input_width = 5;
  int64_t output_width = 6;
  int64_t tokens = 17;
  bool options = true;  // biases, noise, leaf_scale, alternates and grad_scores
  bool tie_right = true;
  Activation activation = Activation::kGelu;
  bool straight_through = true;
  double min_slope = 0;
  bool only_nodes = false;  // the gradients that are wanted
};

std::ostream& operator<<(std::ostream& os, const TreeCase& c) {
  return os << "levels " << c.levels << " leaf_width " << c.leaf_width << " node_output "
            << c.node_output << " trees " << c.trees << " widths " << c.input_width << ", "
            << c.output_width << " tokens " << c.tokens << " options " << c.options << " tie_right "
            << c.tie_right << " activation " << static_cast<int>(c.activation)
            << " straight_through " << c.straight_through << " min_slope " << c.min_slope
            << " only_nodes " << c.only_nodes;
}

// Neuron trees, leaf networks, and both; plain, and with all that is optional.
std::vector<TreeCase> tree_cases() {
  return {
      {.levels = 0, .leaf_width = 2, .node_output = false},
      {.levels = 1, .leaf_width = 0, .node_output = true},
      {.levels = 3, .leaf_width = 3, .node_output = false, .activation = Activation::kRelu},
      {.levels = 4, .leaf_width = 1, .node_output = false, .tokens = 33, .tie_right = false},
      {.levels = 2, .leaf_width = 2, .node_output = false, .options = false},
      {.levels = 2,
       .leaf_width = 2,
       .node_output = false,
       .options = false,
       .straight_through = false},
      {.levels = 4, .leaf_width = 0, .node_output = true, .trees = 3, .tie_right = false},
      {.levels = 3, .leaf_width = 0, .node_output = true, .options = false},
      {.levels = 3,
       .leaf_width = 2,
       .node_output = true,
       .trees = 2,
       .activation = Activation::kSilu},
      {.levels = 2, .leaf_width = 2, .node_output = true, .straight_through = false},
      {.levels = 2,
       .leaf_width = 2,
       .node_output = true,
       .input_width = 37,
       .output_width = 70,
       .activation = Activation::kGeluTanh},
      {.levels = 2, .leaf_width = 1, .node_output = true, .input_width = 1, .output_width = 1},
      {.levels = 2, .leaf_width = 1, .node_output = false, .input_width = 0},
      {.levels = 3, .leaf_width = 2, .node_output = true, .only_nodes = true},
      {.levels = 4, .leaf_width = 2, .node_output = false, .min_slope = 0.6},
  };
}

// The arrays of one hard-tree call and the structs that point to them.
template <typename T>
struct TreeProblem {
  using A = acc_t<T>;
  std::vector<T> node_weight, node_bias, node_output, w1, b1, w2, b2, x, grad_output;
  std::vector<A> noise, leaf_scale, alternates, grad_scores;
  TreeForward forward = {};

  explicit TreeProblem(const TreeCase& c) : case_(c) {
    TreeShape& s = forward.shape;
    const bool has_leaves = c.leaf_width > 0;
    s = {.tokens = c.tokens,
         .input_width = c.input_width,
         .output_width = c.output_width,
         .trees = c.trees,
         .leaf_width = c.leaf_width,
         .levels = c.levels,
         .decisions = has_leaves ? c.levels : c.levels - 1};
    const int64_t nodes = s.trees * s.nodes();
    const int64_t leaves = s.trees * s.leaves();
    const int64_t neurons = leaves * s.leaf_width;
    node_weight = random_values<T>(nodes * s.input_width);
    node_bias = random_values<T>(nodes, c.options);
    node_output = random_values<T>(nodes * s.output_width, c.node_output);
    w1 = random_values<T>(neurons * s.input_width);
    b1 = random_values<T>(neurons, c.options);
    w2 = random_values<T>(neurons * s.output_width);
    b2 = random_values<T>(leaves * s.output_width, c.options && has_leaves);
    x = random_values<T>(s.tokens * s.input_width);
    noise = random_values<A>(s.tokens * s.trees * s.levels, c.options);
    leaf_scale = random_values<A>(s.tokens * s.trees * s.leaf_width, c.options);
    alternates = random_values<A>(s.tokens * s.trees * s.levels, c.options);
    grad_output = random_values<T>(s.tokens * s.output_width);
    grad_scores = random_values<A>(s.tokens * s.trees * s.levels, c.options);
    forward.dtype = kDType<T>;
    forward.output_dtype = c.trees > 1 ? kDType<A> : kDType<T>;
    forward.tie_right = c.tie_right;
    forward.node_activation = c.activation;
    forward.leaf_activation = c.activation;
    forward.weights = {node_weight.data(), data_or_null(node_bias), data_or_null(node_output),
                       data_or_null(w1),   data_or_null(b1),        data_or_null(w2),
                       data_or_null(b2)};
    forward.x = x.data();
    forward.noise = data_or_null(noise);
    forward.leaf_scale = data_or_null(leaf_scale);
  }

  // What a forward pass writes. `untouched` stays where it fails to.
  struct Output {
    std::vector<T> narrow;
    std::vector<A> wide;  // instead of narrow, when several trees add up
    std::vector<A> scores;
    std::vector<int64_t> leaf;
  };

  template <typename Run>
  Output run_forward(float untouched, bool with_output, const Run& run) const {
    const TreeShape& s = forward.shape;
    const int64_t size = s.tokens * s.output_width;
    Output out;
    out.narrow.resize(s.trees == 1 ? size : 0, static_cast<T>(untouched));
    out.wide.resize(s.trees == 1 ? 0 : size, static_cast<A>(untouched));
    out.scores.resize(s.tokens * s.trees * s.levels, static_cast<A>(untouched));
    out.leaf.resize(s.tokens * s.trees, static_cast<int64_t>(untouched));
    TreeForward p = forward;
    if (with_output) {
      p.output = s.trees == 1 ? static_cast<void*>(out.narrow.data()) : out.wide.data();
    } else {
      out.narrow.clear();
      out.wide.clear();
    }
    p.scores = out.scores.data();
    p.leaf = out.leaf.data();
    run(p);
    return out;
  }

  // Those of weights are of W.
  template <typename W>
  struct Gradients {
    std::vector<T> narrow_x;
    std::vector<A> wide_x;
    std::vector<W> node_weight, node_bias, node_output, w1, b1, w2, b2;
  };

  // `weights` is what the gradients of weights that are written are made of before.
  template <typename W, typename Run>
  Gradients<W> run_backward(float untouched, W weights, Output& routes, const Run& run) {
    const TreeShape& s = forward.shape;
    const bool want_x = !case_.only_nodes, want_leaves = !case_.only_nodes;
    Gradients<W> g;
    g.narrow_x.resize(want_x && s.trees == 1 ? x.size() : 0, static_cast<T>(untouched));
    g.wide_x.resize(want_x && s.trees > 1 ? x.size() : 0, static_cast<A>(untouched));
    TreeBackward p = {};
    p.forward = forward;
    p.grad_output = grad_output.data();
    p.grad_scores = data_or_null(grad_scores);
    p.scores = routes.scores.data();
    p.leaf = routes.leaf.data();
    p.straight_through = case_.straight_through;
    p.slope = 1.5;
    p.min_slope = case_.min_slope;
    p.alternates = data_or_null(alternates);
    p.grad_x = s.trees == 1 ? static_cast<void*>(data_or_null(g.narrow_x)) : data_or_null(g.wide_x);
    p.grad_x_dtype = forward.output_dtype;
    const W of_nodes = p.scores_have_gradients() ? weights : W(0);
    g.node_weight.resize(node_weight.size(), of_nodes);
    g.node_bias.resize(node_bias.size(), of_nodes);
    g.node_output.resize(node_output.size(), of_nodes);
    g.w1.resize(want_leaves ? w1.size() : 0, weights);
    g.b1.resize(want_leaves ? b1.size() : 0, weights);
    g.w2.resize(want_leaves ? w2.size() : 0, weights);
    g.b2.resize(want_leaves ? b2.size() : 0, weights);
    p.grad_weights_dtype = kDType<W>;
    p.grad_node_weight = data_or_null(g.node_weight);
    p.grad_node_bias = data_or_null(g.node_bias);
    p.grad_node_output = data_or_null(g.node_output);
    p.grad_w1 = data_or_null(g.w1);
    p.grad_b1 = data_or_null(g.b1);
    p.grad_w2 = data_or_null(g.w2);
    p.grad_b2 = data_or_null(g.b2);
    run(p);
    return g;
  }

 private:
  TreeCase case_;
};

template <typename T>
void check_backward(TreeProblem<T>& problem, int64_t leaf_offset = 0) {
  auto routes = problem.run_forward(7, true, cpu::kernels().tree_forward);
  for (int64_t& leaf : routes.leaf) {
    leaf += leaf_offset;
  }
  using A = acc_t<T>;
  const auto expected = problem.run_backward(7, A(0), routes, cpu::kernels().tree_backward);
  const auto expect_weights = [](const std::vector<T>& got, const std::vector<A>& sums,
                                 const char* name) {
    expect_close(got, std::vector<T>(sums.begin(), sums.end()), name);
  };
  for (const cuda::Order order : cuda::kOrders) {
    SCOPED_TRACE(static_cast<int>(order));
    HostQueue queue(order);
    const auto got = problem.run_backward(
        -7, static_cast<T>(NAN), routes,
        [&](const TreeBackward& p) { cuda::pipeline::tree_backward<T>(p, queue); });
    expect_close(got.narrow_x, expected.narrow_x, "grad_x");
    expect_close(got.wide_x, expected.wide_x, "grad_x");
    expect_weights(got.node_weight, expected.node_weight, "grad_node_weight");
    expect_weights(got.node_bias, expected.node_bias, "grad_node_bias");
    expect_weights(got.node_output, expected.node_output, "grad_node_output");
    expect_weights(got.w1, expected.w1, "grad_w1");
    expect_weights(got.b1, expected.b1, "grad_b1");
    expect_weights(got.w2, expected.w2, "grad_w2");
    expect_weights(got.b2, expected.b2, "grad_b2");
  }
}

template <typename T>
class CudaHost : public testing::Test {};
using Types = testing::Types<float, double, c10::BFloat16, c10::Half>;
TYPED_TEST_SUITE(CudaHost, Types);

TYPED_TEST(CudaHost, TreeBackward) {
  for (const TreeCase& c : tree_cases()) {
    SCOPED_TRACE(testing::Message() << c);
    TreeProblem<TypeParam> problem(c);
    check_backward(problem);
  }
}

TYPED_TEST(CudaHost, TreeOfNaNAndInfinity) {
  using A = acc_t<TypeParam>;
  TreeProblem<TypeParam> problem({.levels = 3, .leaf_width = 2, .node_output = true});
  problem.x[0] = std::numeric_limits<TypeParam>::quiet_NaN();
  problem.noise[5] = std::numeric_limits<A>::infinity();
  problem.noise[6] = -std::numeric_limits<A>::infinity();
  check_backward(problem);
}

TYPED_TEST(CudaHost, TreeBackwardStaysInsideForAnyLeaf) {
  TreeProblem<TypeParam> problem({.levels = 3, .leaf_width = 2, .node_output = true});
  check_backward(problem, int64_t(1) << 40);
  check_backward(problem, -3);
}

// Against the CPU's, of float32.
TYPED_TEST(CudaHost, PathGates) {
  using T = TypeParam;
  if constexpr (!std::is_same_v<T, double>) {
    for (const auto& [levels, trees, tokens] :
         {std::tuple{1, 3, 13}, {3, 1, 33}, {5, 7, 20}, {6, 2, 70}}) {
      SCOPED_TRACE(testing::Message()
                   << levels << " levels, " << trees << " trees, " << tokens << " tokens");
      const bool plain = levels == 3;  // without what is optional
      PathGates p = {};
      p.tree.forward.shape = {.tokens = tokens,
                              .input_width = 1,
                              .output_width = 1,
                              .trees = trees,
                              .leaf_width = 0,
                              .levels = levels,
                              .decisions = levels - 1};
      const TreeShape& s = p.tree.forward.shape;
      const int64_t pairs = s.tokens * s.trees, all = pairs * s.nodes();
      auto all_scores = random_values<float>(all), biased = all_scores;
      auto bias = random_values<T>(s.trees * s.nodes(), !plain);
      auto noise = random_values<float>(pairs * s.levels, !plain);
      auto grad_scores = random_values<float>(pairs * s.levels, !plain);
      const auto grad_gates = random_values<float>(all);
      for (int64_t i = 0; i < all && !plain; ++i) {
        biased[i] += static_cast<float>(bias[i % (s.trees * s.nodes())]);
      }
      p.tree.forward.tie_right = plain;
      p.tree.forward.node_activation = Activation::kGelu;
      p.tree.forward.noise = data_or_null(noise);
      p.tree.grad_scores = data_or_null(grad_scores);
      p.tree.forward.weights.node_output = grad_gates.data();  // that they exist is all that counts

      struct Results {
        std::vector<float> scores;
        std::vector<int64_t> leaf;
        std::vector<T> gates, again, grads;
      };
      // W: what numbers other than scores are made of.
      const auto run = [&]<typename W>(W undefined, const auto& forward, const auto& backward) {
        std::vector<float> scores(pairs * s.levels, NAN);
        std::vector<int64_t> leaf(pairs, -1);
        std::vector<W> gates(all, undefined), again = gates, grads = gates;
        PathGates own = p;
        own.tree.forward.dtype = kDType<W>;
        own.tree.forward.scores = scores.data();
        own.tree.forward.leaf = leaf.data();
        own.gates = gates.data();
        forward(own);
        for (int64_t& l : leaf) {
          l += int64_t(1) << 40;  // its low bits count
        }
        own.tree.scores = scores.data();
        own.tree.leaf = leaf.data();
        own.gates = again.data();
        own.grad_all_scores = grads.data();
        backward(own);
        const auto rounded = [](const std::vector<W>& v) {
          return std::vector<T>(v.begin(), v.end());
        };
        return Results{scores, leaf, rounded(gates), rounded(again), rounded(grads)};
      };
      p.all_scores = biased.data();
      p.grad_gates = grad_gates.data();
      const Results want =
          run(std::nanf(""), cpu::kernels().path_gates, cpu::kernels().path_gates_backward);
      p.all_scores = all_scores.data();
      p.bias = data_or_null(bias);
      for (const cuda::Order order : cuda::kOrders) {
        HostQueue queue(order);
        const Results got = run(
            static_cast<T>(NAN),
            [&](const PathGates& own) { cuda::pipeline::path_gates<T>(own, queue); },
            [&](const PathGates& own) { cuda::pipeline::path_gates_backward<T>(own, queue); });
        EXPECT_EQ(got.scores, want.scores);
        EXPECT_EQ(got.leaf, want.leaf);
        expect_close(got.gates, want.gates, "gates");
        expect_close(got.again, want.again, "gates, once more");
        expect_close(got.grads, want.grads, "gradients");
      }
    }
  }
}

// Of one token, whose gradients of biases are those of all scores.
TYPED_TEST(CudaHost, PathGatesOfStraightThroughRoutes) {
  using T = TypeParam;
  if constexpr (!std::is_same_v<T, double>) {
    for (const double min_slope : {0.0, 0.6}) {
      TreeProblem<T> problem({.levels = 5,
                              .leaf_width = 0,
                              .node_output = true,
                              .trees = 40,
                              .tokens = 1,
                              .min_slope = min_slope});
      auto routes = problem.run_forward(7, true, cpu::kernels().tree_forward);
      problem.run_backward(7, 0.0f, routes, [&](const TreeBackward& p) {
        cpu::kernels().tree_backward(p);
        const TreeShape& s = p.forward.shape;
        const int64_t all = s.trees * s.nodes();
        const auto products = [&](const void* rows, const void* vector, int64_t width) {
          std::vector<float> sums(all);
          for (int64_t i = 0; i < all * width; ++i) {
            sums[i / width] += static_cast<float>(static_cast<const T*>(rows)[i]) *
                               static_cast<float>(static_cast<const T*>(vector)[i % width]);
          }
          return sums;
        };
        const auto scores = products(p.forward.weights.node_weight, p.forward.x, s.input_width);
        const auto alongs = products(p.forward.weights.node_output, p.grad_output, s.output_width);
        std::vector<T> gates(all), got(all, static_cast<T>(NAN));
        PathGates paths = {};
        paths.tree = p;
        paths.all_scores = scores.data();
        paths.bias = p.forward.weights.node_bias;
        paths.gates = gates.data();
        paths.grad_gates = alongs.data();
        paths.grad_all_scores = got.data();
        HostQueue queue(cuda::Order::kRandom);
        cuda::pipeline::path_gates_backward<T>(paths, queue);
        const float* want = static_cast<const float*>(p.grad_node_bias);
        expect_close(got, std::vector<T>(want, want + all), "gradients");
      });
    }
  }
}

TYPED_TEST(CudaHost, LeafMixture) {
  using T = TypeParam;
  const int64_t tokens = 5;
  for (int depth : {0, 1, 2, 3, 5, 9, 12}) {
    SCOPED_TRACE(depth);
    const int64_t leaves = int64_t(1) << depth;
    auto logits = random_values<T>(tokens * (leaves - 1));
    auto grad = random_values<T>(tokens * leaves);
    std::vector<T> mixture(tokens * leaves, T(7)), got_mixture(tokens * leaves, T(-7));
    std::vector<T> grad_logits(logits.size(), T(7)), got_grad(logits.size(), T(-7));
    LeafMixture p = {};
    p.tokens = tokens;
    p.depth = depth;
    p.dtype = kDType<T>;
    p.node_logits = logits.data();
    p.grad_mixture = grad.data();
    p.mixture = mixture.data();
    p.grad_node_logits = grad_logits.data();
    cpu::kernels().leaf_mixture(p);
    cpu::kernels().leaf_mixture_backward(p);
    for (const cuda::Order order : cuda::kOrders) {
      SCOPED_TRACE(static_cast<int>(order));
      HostQueue queue(order);
      p.mixture = got_mixture.data();
      cuda::pipeline::leaf_mixture<T>(p, queue);
      expect_close(got_mixture, mixture, "mixture");
      p.mixture = mixture.data();
      p.grad_node_logits = got_grad.data();
      cuda::pipeline::leaf_mixture_backward<T>(p, queue);
      expect_close(got_grad, grad_logits, "grad_node_logits");
    }
  }
}

TYPED_TEST(CudaHost, LeafMixtureKeepsSmallSharesAndNaN) {
  using T = TypeParam;
  std::vector<T> logits = {T(16), T(-16), T(NAN)}, mixture(6), expected(6);
  LeafMixture p = {};
  p.tokens = 3;
  p.depth = 1;
  p.dtype = kDType<T>;
  p.node_logits = logits.data();
  p.mixture = expected.data();
  cpu::kernels().leaf_mixture(p);
  p.mixture = mixture.data();
  HostQueue queue(cuda::Order::kForward);
  cuda::pipeline::leaf_mixture<T>(p, queue);
  expect_close(mixture, expected, "mixture");
  const double small = std::exp(-16.0) / (1 + std::exp(-16.0));
  const double tolerance = std::is_same_v<T, c10::Half> ? 0.5 : 1e-2;  // subnormal in half
  EXPECT_NEAR(static_cast<double>(mixture[0]) / small, 1, tolerance);
  EXPECT_NEAR(static_cast<double>(mixture[3]) / small, 1, tolerance);
}

TYPED_TEST(CudaHost, GatedActivation) {
  using T = TypeParam;
  const int64_t tokens = 5;
  for (Activation activation : {Activation::kIdentity, Activation::kRelu, Activation::kGelu,
                                Activation::kGeluTanh, Activation::kSilu}) {
    for (const auto& [leaves, leaf_width] : {std::pair{7, 1}, {1, 9}, {8, 3}, {3, 64}, {2, 300}}) {
      SCOPED_TRACE(testing::Message() << "activation " << static_cast<int>(activation) << " leaves "
                                      << leaves << " leaf_width " << leaf_width);
      const int64_t size = tokens * leaves * leaf_width;
      auto pre = random_values<T>(size), grad = random_values<T>(size);
      auto mixture = random_values<T>(tokens * leaves);
      std::vector<T> output(size, T(7)), grad_pre(size, T(7)), grad_mixture(tokens * leaves, T(7));
      GatedActivation p = {};
      p.tokens = tokens;
      p.leaves = leaves;
      p.leaf_width = leaf_width;
      p.dtype = kDType<T>;
      p.activation = activation;
      p.pre = pre.data();
      p.mixture = mixture.data();
      p.grad_output = grad.data();
      p.output = output.data();
      p.grad_pre = grad_pre.data();
      p.grad_mixture = grad_mixture.data();
      cpu::kernels().gated_activation(p);
      cpu::kernels().gated_activation_backward(p);
      for (const cuda::Order order : cuda::kOrders) {
        SCOPED_TRACE(static_cast<int>(order));
        std::vector<T> got(size, T(-7)), got_pre(size, T(-7)), got_mixture(tokens * leaves, T(-7));
        p.output = got.data();
        p.grad_pre = got_pre.data();
        p.grad_mixture = got_mixture.data();
        HostQueue queue(order);
        cuda::pipeline::gated_activation<T>(p, queue);
        cuda::pipeline::gated_activation_backward<T>(p, queue);
        expect_close(got, output, "output");
        expect_close(got_pre, grad_pre, "grad_pre");
        expect_close(got_mixture, grad_mixture, "grad_mixture");
      }
    }
  }
}

}  // namespace
}  // namespace fff
