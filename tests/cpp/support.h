// The problems that the tests pose, everything that can solve them, and how answers are compared.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <ostream>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "reference.h"
#include "tree.h"
#include "visited_rows.h"

namespace fff::test {

constexpr at::ScalarType kDtypes[] = {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf};
constexpr Activation kActivations[] = {Activation::kIdentity, Activation::kRelu, Activation::kGelu,
                                       Activation::kGeluTanh, Activation::kSilu};

inline const char* name_of(Activation a) {
  constexpr const char* names[] = {"identity", "relu", "gelu", "gelu_tanh", "silu"};
  return names[static_cast<int>(a)];
}

inline DType dtype_of(const at::Tensor& t) {
  return Check("test").dtype(t, "t");
}

// --- numbers -------------------------------------------------------------------------------------

class Random {
 public:
  explicit Random(unsigned seed) : source_(seed) {}

  // Multiples of 1/8 in [-1, 1]. They are exact in every dtype, and so are sums of their products
  // in float32 in any order: scores and routes must agree exactly with the reference, ties
  // included.
  at::Tensor grid(at::IntArrayRef shape) {
    return fill(shape, [&] { return (static_cast<int>(source_() % 17) - 8) / 8.0; });
  }
  at::Tensor normal(at::IntArrayRef shape) {
    std::normal_distribution<double> normal;
    return fill(shape, [&] { return normal(source_); });
  }

 private:
  static at::Tensor fill(at::IntArrayRef shape, const std::function<double()>& next) {
    at::Tensor t = at::empty(shape, at::kDouble);
    std::generate_n(t.data_ptr<double>(), t.numel(), next);
    return t;
  }

  std::mt19937 source_;
};

// Largest difference from the reference, relative to its largest value (at least 1).
inline double tolerance(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return 1e-12;
    case at::kFloat:
      return 1e-5;
    case at::kHalf:
      return 1e-3;
    default:
      return 4e-3;
  }
}

inline void expect_within(double relative, const char* what, const at::Tensor& got,
                          const at::Tensor& want) {
  ASSERT_EQ(got.sizes(), want.sizes()) << what;
  const at::Tensor g = got.to(at::kDouble).contiguous(), w = want.to(at::kDouble).contiguous();
  const double* gs = g.const_data_ptr<double>();
  const double* ws = w.const_data_ptr<double>();
  double scale = 1;
  for (int64_t i = 0; i < w.numel(); ++i) {
    scale = std::isfinite(ws[i]) ? std::max(scale, std::abs(ws[i])) : scale;
  }
  for (int64_t i = 0; i < w.numel(); ++i) {
    ASSERT_TRUE(gs[i] == ws[i] || (std::isnan(gs[i]) && std::isnan(ws[i])) ||
                std::abs(gs[i] - ws[i]) <= relative * scale)
        << what << "[" << i << "] of " << got.sizes() << ": got " << gs[i] << ", want " << ws[i];
  }
}

inline void expect_close(const char* what, const at::Tensor& got, const at::Tensor& want) {
  expect_within(tolerance(got.scalar_type()), what, got, want);
}

inline void expect_equal(const char* what, const at::Tensor& got, const at::Tensor& want) {
  expect_within(0, what, got, want);
}

// `compute` returns tensors that must be the same bits with any number of threads.
template <typename Compute>
void expect_same_with_any_threads(const Compute& compute) {
  const int before = at::get_num_threads();
  at::set_num_threads(1);
  const auto want = compute();
  for (const int threads : {2, 3}) {
    at::set_num_threads(threads);
    const auto got = compute();
    for (size_t i = 0; i < want.size(); ++i) {
      EXPECT_TRUE(got[i].equal(want[i])) << "result " << i << " with " << threads << " threads";
    }
  }
  at::set_num_threads(before);
}

// `call` must throw, with a message that contains every one of `parts`.
template <typename Call>
void expect_error(const Call& call, const std::vector<std::string>& parts) {
  try {
    call();
  } catch (const c10::Error& error) {
    const std::string message = error.what_without_backtrace();
    for (const std::string& part : parts) {
      EXPECT_NE(message.find(part), std::string::npos)
          << "missing '" << part << "' in: " << message;
    }
    return;
  }
  ADD_FAILURE() << "no error that says '" << parts.back() << "'";
}

// --- what is tested ------------------------------------------------------------------------------

// The operators, or the kernel table of one instruction set.
struct Implementation {
  const char* name;
  std::optional<cpu::Kernels> kernels;
  bool supported = true;
  // Whether it writes the gradients of weights whole, in the weights' dtype.
  bool writes_whole = false;
};

inline void PrintTo(const Implementation& implementation, std::ostream* os) {
  *os << implementation.name;
}

inline std::vector<Implementation> implementations() {
  std::vector<Implementation> all = {{"operators", std::nullopt},
                                     {"default_table", cpu::default_table()}};
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw");
  all.push_back({"avx2_table", cpu::avx2_table(), avx2});
  all.push_back({"avx512_table", cpu::avx512_table(), avx512});
#endif
  return all;
}

class ImplementationTest : public testing::TestWithParam<Implementation> {
 protected:
  void SetUp() override {
    if (!GetParam().supported) {
      GTEST_SKIP() << "this processor lacks the instruction set of " << GetParam().name;
    }
  }
};

inline const Implementation& the_reference() {
  static const Implementation reference = {"reference", reference::table()};
  return reference;
}

// --- hard trees ----------------------------------------------------------------------------------

struct TreeCase {
  int levels = 3;
  int64_t leaf_width = 2;  // 0: no leaf networks, but node outputs
  int64_t tokens = 7;
  int64_t input_width = 16;
  int64_t output_width = 16;
  int64_t trees = 1;
  bool node_bias = true;
  bool node_output = false;
  bool b1 = true;
  bool b2 = true;
  bool noise = false;
  bool leaf_scale = false;
  bool tie_right = true;
  bool straight_through = true;
  bool alternates = false;
  bool grad_scores = false;
  Activation activation = Activation::kRelu;  // of the leaves; the nodes get the next one
  double slope = 1.5;
  double min_slope = 0;

  Activation node_activation() const {
    return static_cast<Activation>((static_cast<int>(activation) + 1) % std::size(kActivations));
  }
};

inline std::ostream& operator<<(std::ostream& os, const TreeCase& c) {
  os << c.levels << " levels, leaf width " << c.leaf_width << ", " << c.tokens << " tokens, "
     << c.input_width << " -> " << c.output_width << ", " << c.trees << " trees, "
     << name_of(c.activation) << ", min_slope " << c.min_slope;
  const std::pair<bool, const char*> flags[] = {{c.node_bias, "node_bias"},
                                                {c.node_output, "node_output"},
                                                {c.b1, "b1"},
                                                {c.b2, "b2"},
                                                {c.noise, "noise"},
                                                {c.leaf_scale, "leaf_scale"},
                                                {c.tie_right, "tie_right"},
                                                {c.straight_through, "straight_through"},
                                                {c.alternates, "alternates"},
                                                {c.grad_scores, "grad_scores"}};
  for (const auto& [set, name] : flags) {
    os << (set ? ", " : "") << (set ? name : "");
  }
  return os;
}

struct TreeArguments {
  at::Tensor x, node_weight;
  OptionalTensor node_bias = {}, node_output = {}, w1 = {}, b1 = {}, w2 = {}, b2 = {};
  OptionalTensor noise = {}, leaf_scale = {}, alternates = {};
  OptionalTensor grad_output = {}, grad_scores = {};

  // As the operators want them for an x of `dtype`.
  TreeArguments to(at::ScalarType dtype) const {
    const auto cast = [](const OptionalTensor& t, at::ScalarType type) {
      return t ? OptionalTensor(t->to(type)) : std::nullopt;
    };
    const at::ScalarType acc = accumulation_type(dtype);
    return {.x = x.to(dtype),
            .node_weight = node_weight.to(dtype),
            .node_bias = cast(node_bias, dtype),
            .node_output = cast(node_output, dtype),
            .w1 = cast(w1, dtype),
            .b1 = cast(b1, dtype),
            .w2 = cast(w2, dtype),
            .b2 = cast(b2, dtype),
            .noise = cast(noise, acc),
            .leaf_scale = cast(leaf_scale, acc),
            .alternates = cast(alternates, acc),
            .grad_output = cast(grad_output, dtype),
            .grad_scores = cast(grad_scores, acc)};
  }
};

// Arguments in float64, drawn by `draw`, which is a member function of Random.
inline TreeArguments make_arguments(const TreeCase& c,
                                    at::Tensor (Random::*draw)(at::IntArrayRef) = &Random::grid) {
  Random random(1);
  const int64_t nodes = c.trees * ((int64_t(1) << c.levels) - 1);
  const int64_t leaves = c.trees << c.levels;
  const bool has_leaves = c.leaf_width > 0;
  const auto make = [&](bool present, std::vector<int64_t> shape) {
    return present ? OptionalTensor((random.*draw)(shape)) : std::nullopt;
  };
  // About half of the factors are 0.
  const auto half_of = [](const OptionalTensor& t) {
    return t ? OptionalTensor(t->clamp_min(0)) : std::nullopt;
  };
  return {.x = (random.*draw)({c.tokens, c.input_width}),
          .node_weight = (random.*draw)({nodes, c.input_width}),
          .node_bias = make(c.node_bias, {nodes}),
          .node_output = make(c.node_output || !has_leaves, {nodes, c.output_width}),
          .w1 = make(has_leaves, {leaves, c.leaf_width, c.input_width}),
          .b1 = make(has_leaves && c.b1, {leaves, c.leaf_width}),
          .w2 = make(has_leaves, {leaves, c.leaf_width, c.output_width}),
          .b2 = make(has_leaves && c.b2, {leaves, c.output_width}),
          .noise = make(c.noise, {c.tokens, c.trees, c.levels}),
          .leaf_scale = make(has_leaves && c.leaf_scale, {c.tokens, c.trees, c.leaf_width}),
          .alternates = half_of(make(c.alternates, {c.tokens, c.trees, c.levels})),
          .grad_output = make(true, {c.tokens, c.output_width}),
          .grad_scores = make(c.grad_scores, {c.tokens, c.trees, c.levels})};
}

struct TreeOutputs {
  at::Tensor output, scores, leaf;
};

constexpr const char* kGradientNames[] = {"x",  "node_weight", "node_bias", "node_output",
                                          "w1", "b1",          "w2",        "b2"};
using Gradients = std::array<at::Tensor, 8>;

inline TreeOutputs call_tree(const TreeCase& c, const TreeArguments& a) {
  const auto [output, scores, leaf] =
      tree(a.x, a.node_weight, a.node_bias, a.node_output, a.w1, a.b1, a.w2, a.b2, a.noise,
           a.leaf_scale, a.alternates, c.trees, c.tie_right, name_of(c.node_activation()),
           name_of(c.activation), c.straight_through, c.slope, c.min_slope, false);
  return {output, scores, leaf};
}

inline Gradients call_tree_backward(const TreeCase& c, const TreeArguments& a, const TreeOutputs& y,
                                    std::array<bool, 3> mask = {true, true, true}) {
  return std::apply(
      [](const auto&... t) { return Gradients{t...}; },
      tree_backward(a.grad_output, a.grad_scores, y.scores, y.leaf, a.x, a.node_weight, a.node_bias,
                    a.node_output, a.w1, a.b1, a.w2, a.b2, a.noise, a.leaf_scale, a.alternates,
                    c.trees, c.tie_right, name_of(c.node_activation()), name_of(c.activation),
                    c.straight_through, c.slope, c.min_slope, mask));
}

// Of the weights visited rows alone, which are checked to be those of the paths.
inline Gradients call_tree_backward_rows(const TreeCase& c, const TreeArguments& a,
                                         const TreeOutputs& y) {
  const auto [x, nodes, leaves, node_weight, node_bias, node_output, w1, b1, w2, b2] =
      tree_backward_rows(a.grad_output, a.grad_scores, y.scores, y.leaf, a.x, a.node_weight,
                         a.node_bias, a.node_output, a.w1, a.b1, a.w2, a.b2, a.noise, a.leaf_scale,
                         a.alternates, c.trees, c.tie_right, name_of(c.node_activation()),
                         name_of(c.activation), c.straight_through, c.slope, c.min_slope,
                         {true, true, true});
  std::set<int64_t> visited_nodes, visited_leaves;
  const int64_t leaf_count = int64_t(1) << (c.leaf_width > 0 ? c.levels : c.levels - 1);
  for (int64_t i = 0; i < y.leaf.numel(); ++i) {
    const int64_t tree = i % c.trees;
    // Heap indices counted from 1, with the leaves as one more level: halving goes up.
    int64_t at = leaf_count + y.leaf.const_data_ptr<int64_t>()[i];
    if (c.leaf_width > 0) {
      visited_leaves.insert(tree * leaf_count + at - leaf_count);
      at /= 2;
    }
    for (; at > 0; at /= 2) {
      visited_nodes.insert(tree * ((int64_t(1) << c.levels) - 1) + at - 1);
    }
  }
  const auto expect_ids = [](const at::Tensor& got, const std::set<int64_t>& want) {
    const int64_t* ids = got.const_data_ptr<int64_t>();
    EXPECT_EQ(std::vector<int64_t>(ids, ids + got.numel()),
              std::vector<int64_t>(want.begin(), want.end()));
  };
  expect_ids(nodes, visited_nodes);
  expect_ids(leaves, visited_leaves);
  return {x, node_weight, node_bias, node_output, w1, b1, w2, b2};
}

inline TreeForward params_of(const TreeCase& c, const TreeArguments& a) {
  return {.shape = {.tokens = c.tokens,
                    .input_width = c.input_width,
                    .output_width = c.output_width,
                    .trees = c.trees,
                    .leaf_width = c.leaf_width,
                    .levels = c.levels,
                    .decisions = c.leaf_width > 0 ? c.levels : c.levels - 1},
          .dtype = dtype_of(a.x),
          .tie_right = c.tie_right,
          .node_activation = c.node_activation(),
          .leaf_activation = c.activation,
          .weights = {.node_weight = a.node_weight.data_ptr(),
                      .node_bias = data_or_null(a.node_bias),
                      .node_output = data_or_null(a.node_output),
                      .w1 = data_or_null(a.w1),
                      .b1 = data_or_null(a.b1),
                      .w2 = data_or_null(a.w2),
                      .b2 = data_or_null(a.b2)},
          .x = a.x.data_ptr(),
          .noise = data_or_null(a.noise),
          .leaf_scale = data_or_null(a.leaf_scale),
          .output = nullptr,
          .output_dtype = {},
          .scores = nullptr,
          .leaf = nullptr};
}

// The dtype in which kernels sum over trees.
inline at::ScalarType sum_type(const TreeCase& c, const at::Tensor& x) {
  return c.trees > 1 ? accumulation_type(x.scalar_type()) : x.scalar_type();
}

inline TreeOutputs run_tree(const Implementation& by, const TreeCase& c, const TreeArguments& a) {
  if (!by.kernels) {
    return call_tree(c, a);
  }
  const at::ScalarType acc = accumulation_type(a.x.scalar_type());
  const TreeOutputs y = {at::empty({c.tokens, c.output_width}, sum_type(c, a.x)),
                         at::empty({c.tokens, c.trees, c.levels}, acc),
                         at::empty({c.tokens, c.trees}, at::kLong)};
  TreeForward p = params_of(c, a);
  p.output = y.output.data_ptr();
  p.output_dtype = dtype_of(y.output);
  p.scores = y.scores.data_ptr();
  p.leaf = y.leaf.data_ptr<int64_t>();
  by.kernels->tree_forward(p);
  return y;
}

// With `rows` the gradients of weights have those rows alone.
inline Gradients run_tree_backward(const Implementation& by, const TreeCase& c,
                                   const TreeArguments& a, const TreeOutputs& y,
                                   const VisitedRows* rows = nullptr) {
  if (!by.kernels) {
    return rows ? call_tree_backward_rows(c, a, y) : call_tree_backward(c, a, y);
  }
  const at::ScalarType acc = accumulation_type(a.x.scalar_type());
  const bool scored = c.straight_through || a.grad_scores || a.node_output;
  const auto gradient_like = [&](const OptionalTensor& weight,
                                 std::vector<int64_t> VisitedRows::* ids) {
    std::vector<int64_t> sizes = weight ? weight->sizes().vec() : std::vector<int64_t>{0};
    if (rows && weight) {
      sizes[0] = static_cast<int64_t>((rows->*ids).size());
    }
    if (!by.writes_whole) {
      return at::zeros(sizes, acc);
    }
    const bool written = scored || ids != &VisitedRows::nodes;
    return at::full(sizes, written ? NAN : 0.0, a.x.scalar_type());
  };
  const auto ids = [](const std::vector<int64_t>& v) {
    return RowIds{v.data(), static_cast<int64_t>(v.size())};
  };
  const Gradients g = {at::empty(a.x.sizes(), sum_type(c, a.x)),
                       gradient_like(a.node_weight, &VisitedRows::nodes),
                       gradient_like(a.node_bias, &VisitedRows::nodes),
                       gradient_like(a.node_output, &VisitedRows::nodes),
                       gradient_like(a.w1, &VisitedRows::leaves),
                       gradient_like(a.b1, &VisitedRows::leaves),
                       gradient_like(a.w2, &VisitedRows::leaves),
                       gradient_like(a.b2, &VisitedRows::leaves)};
  const auto pointer = [](const at::Tensor& t) { return t.numel() > 0 ? t.data_ptr() : nullptr; };
  by.kernels->tree_backward({.forward = params_of(c, a),
                             .grad_output = data_or_null(a.grad_output),
                             .grad_scores = data_or_null(a.grad_scores),
                             .scores = y.scores.data_ptr(),
                             .leaf = y.leaf.data_ptr<int64_t>(),
                             .straight_through = c.straight_through,
                             .slope = c.slope,
                             .min_slope = c.min_slope,
                             .alternates = data_or_null(a.alternates),
                             .nodes = rows ? ids(rows->nodes) : RowIds{},
                             .leaves = rows ? ids(rows->leaves) : RowIds{},
                             .grad_x = g[0].data_ptr(),
                             .grad_x_dtype = dtype_of(g[0]),
                             .grad_weights_dtype = dtype_of(g[1]),
                             .grad_node_weight = pointer(g[1]),
                             .grad_node_bias = pointer(g[2]),
                             .grad_node_output = pointer(g[3]),
                             .grad_w1 = pointer(g[4]),
                             .grad_b1 = pointer(g[5]),
                             .grad_w2 = pointer(g[6]),
                             .grad_b2 = pointer(g[7])});
  return g;
}

// Every number of levels with every leaf width, the other settings mixed, and the cases that the
// kernels treat apart.
inline std::vector<TreeCase> tree_cases() {
  std::vector<TreeCase> cases;
  std::mt19937 random(1);
  const auto pick = [&](auto... values) {
    const std::array choices = {values...};
    return choices[random() % choices.size()];
  };
  for (int levels = 0; levels <= 6; ++levels) {
    for (int64_t leaf_width : {0, 1, 2, 9, 33}) {
      if (levels == 0 && leaf_width == 0) {
        continue;
      }
      for (int64_t trees : {1, 3}) {
        const auto coin = [&] { return random() % 2 == 0; };
        cases.push_back({.levels = levels,
                         .leaf_width = leaf_width,
                         .tokens = pick(1, 7, 33, 100),
                         .input_width = pick(1, 3, 16, 33, 70),
                         .output_width = pick(1, 3, 16, 33, 70),
                         .trees = trees,
                         .node_bias = coin(),
                         .node_output = coin(),
                         .b1 = coin(),
                         .b2 = coin(),
                         .noise = coin(),
                         .leaf_scale = coin(),
                         .tie_right = coin(),
                         .straight_through = coin(),
                         .alternates = coin(),
                         .grad_scores = coin(),
                         .activation = kActivations[random() % std::size(kActivations)],
                         .min_slope = pick(0.0, 0.6)});
      }
    }
  }
  // Every remainder of a vector, on both sides of the tree.
  for (int64_t width = 1; width <= 66; ++width) {
    cases.push_back({.levels = 2,
                     .leaf_width = width % 4,
                     .tokens = 9,
                     .input_width = width,
                     .output_width = 67 - width,
                     .node_output = true});
  }
  // Many tokens: runs that are cut, a first pass over the top levels, blocks of tokens that several
  // trees share, chunks of alternates.
  cases.push_back({.levels = 4, .leaf_width = 9, .tokens = 300, .input_width = 33});
  cases.push_back({.levels = 7, .leaf_width = 1, .tokens = 300, .node_output = true});
  cases.push_back({.levels = 9, .leaf_width = 0, .tokens = 2100, .tie_right = false});
  cases.push_back({.levels = 9,
                   .leaf_width = 0,
                   .tokens = 2100,
                   .tie_right = false,
                   .alternates = true,
                   .min_slope = 0.6});
  cases.push_back({.levels = 8,
                   .leaf_width = 2,
                   .tokens = 4200,
                   .input_width = 3,
                   .output_width = 3,
                   .trees = 3,
                   .noise = true,
                   .leaf_scale = true});
  // Results of more than 8 MiB, which are written past the cache.
  cases.push_back({.levels = 1,
                   .leaf_width = 0,
                   .tokens = 2100,
                   .input_width = 1024,
                   .output_width = 1024,
                   .trees = 2});
  return cases;
}

constexpr TreeCase kWildLeaves = {.levels = 3, .tokens = 6, .node_output = true};

// For the outputs of `kWildLeaves`: no leaf that a caller may pass indexes outside the tree, as its
// low bits count. `backward` reads `y`.
template <typename Backward>
void expect_leaves_stay_inside(const TreeOutputs& y, const Backward& backward) {
  using Limits = std::numeric_limits<int64_t>;
  constexpr int64_t kLeaves[] = {-1,         8, int64_t(1) << 40, Limits::min(), Limits::max(),
                                 -1000000005};
  std::copy_n(kLeaves, kWildLeaves.tokens, y.leaf.data_ptr<int64_t>());
  const Gradients wild = backward();
  y.leaf.bitwise_and_(7);
  const Gradients tame = backward();
  for (size_t i = 0; i < wild.size(); ++i) {
    EXPECT_TRUE(wild[i].equal(tame[i])) << kGradientNames[i];
  }
}

// All tokens to the last leaf.
inline void send_right(TreeArguments& a, const TreeCase& c) {
  a.noise = at::empty({c.tokens, c.trees, c.levels}, at::kDouble);
  a.noise->fill_(INFINITY);
}

}  // namespace fff::test
