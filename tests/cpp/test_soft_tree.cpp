// fff::leaf_mixture, fff::gated_activation and their gradients against the reference.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd.h>

#include "gated_activation.h"
#include "leaf_mixture.h"
#include "support.h"

namespace fff::test {
namespace {

class SoftTreeTest : public ImplementationTest {};

INSTANTIATE_TEST_SUITE_P(, SoftTreeTest, testing::ValuesIn(implementations()),
                         testing::PrintToStringParamName());

int depth_of(const at::Tensor& mixture) {
  return static_cast<int>(std::log2(mixture.size(-1)));
}

at::Tensor run_leaf_mixture(const Implementation& by, const at::Tensor& logits) {
  if (!by.kernels) {
    return leaf_mixture(logits);
  }
  const at::Tensor mixture = at::empty({logits.size(0), logits.size(1) + 1}, logits.options());
  by.kernels->leaf_mixture({.tokens = logits.size(0),
                            .depth = depth_of(mixture),
                            .dtype = dtype_of(logits),
                            .node_logits = logits.data_ptr(),
                            .mixture = mixture.data_ptr(),
                            .grad_mixture = nullptr,
                            .grad_node_logits = nullptr});
  return mixture;
}

at::Tensor run_leaf_mixture_backward(const Implementation& by, const at::Tensor& grad,
                                     const at::Tensor& logits, const at::Tensor& mixture) {
  if (!by.kernels) {
    return leaf_mixture_backward(grad, logits, mixture);
  }
  const at::Tensor grad_logits = at::empty(logits.sizes(), logits.options());
  by.kernels->leaf_mixture_backward({.tokens = logits.size(0),
                                     .depth = depth_of(mixture),
                                     .dtype = dtype_of(logits),
                                     .node_logits = logits.data_ptr(),
                                     .mixture = mixture.data_ptr(),
                                     .grad_mixture = grad.data_ptr(),
                                     .grad_node_logits = grad_logits.data_ptr()});
  return grad_logits;
}

TEST_P(SoftTreeTest, LeafMixtureMatchesReference) {
  Random random(1);
  for (int depth = 0; depth <= 6; ++depth) {
    for (const int64_t tokens : {1, 7, 33, 300}) {
      const int64_t leaves = int64_t(1) << depth;
      const at::Tensor z = random.normal({tokens, leaves - 1});
      const at::Tensor g = random.normal({tokens, leaves});
      for (const at::ScalarType dtype : kDtypes) {
        SCOPED_TRACE(testing::Message() << depth << " deep, " << tokens << " tokens, " << dtype);
        const at::Tensor logits = z.to(dtype), grad = g.to(dtype);
        const at::Tensor want = run_leaf_mixture(the_reference(), logits.to(at::kDouble));
        const at::Tensor got = run_leaf_mixture(GetParam(), logits);
        expect_close("mixture", got, want);
        expect_close("grad_node_logits", run_leaf_mixture_backward(GetParam(), grad, logits, got),
                     run_leaf_mixture_backward(the_reference(), grad.to(at::kDouble),
                                               logits.to(at::kDouble), want));
      }
    }
  }
}

// The small side of a decided node keeps its digits, and infinite logits are plain decisions.
TEST_P(SoftTreeTest, LeafMixtureOfExtremeLogits) {
  const at::Tensor logits = at::empty({4, 3}, at::kFloat);
  const float rows[] = {-30, -20, 20, 40, -30, 5, INFINITY, -3, -INFINITY, -INFINITY, INFINITY, 1};
  std::copy(std::begin(rows), std::end(rows), logits.data_ptr<float>());
  const at::Tensor got = run_leaf_mixture(GetParam(), logits);
  const at::Tensor want = run_leaf_mixture(the_reference(), logits.to(at::kDouble));
  for (int64_t i = 0; i < got.numel(); ++i) {
    const double w = want.data_ptr<double>()[i];
    EXPECT_NEAR(got.data_ptr<float>()[i], w, 1e-6 * w) << i;
  }
}

TEST_P(SoftTreeTest, NanStaysWithItsToken) {
  Random random(1);
  at::Tensor logits = random.normal({9, 15}).to(at::kFloat);
  const at::Tensor grad = random.normal({9, 16}).to(at::kFloat);
  logits.select(0, 4).fill_(NAN);
  const at::Tensor mixture = run_leaf_mixture(GetParam(), logits);
  const at::Tensor want = run_leaf_mixture(the_reference(), logits.to(at::kDouble));
  expect_close("mixture", mixture, want);
  expect_close("grad_node_logits", run_leaf_mixture_backward(GetParam(), grad, logits, mixture),
               run_leaf_mixture_backward(the_reference(), grad.to(at::kDouble),
                                         logits.to(at::kDouble), want));
}

struct GatedGradients {
  at::Tensor pre, mixture;
};

GatedActivation params_of(const at::Tensor& pre, const at::Tensor& mixture, Activation activation) {
  GatedActivation p = {};
  p.tokens = pre.size(0);
  p.leaves = mixture.size(1);
  p.leaf_width = pre.size(1) / mixture.size(1);
  p.dtype = dtype_of(pre);
  p.activation = activation;
  p.pre = pre.data_ptr();
  p.mixture = mixture.data_ptr();
  return p;
}

at::Tensor run_gated(const Implementation& by, const at::Tensor& pre, const at::Tensor& mixture,
                     Activation activation) {
  if (!by.kernels) {
    return gated_activation(pre, mixture, name_of(activation));
  }
  const at::Tensor output = at::empty(pre.sizes(), pre.options());
  GatedActivation p = params_of(pre, mixture, activation);
  p.output = output.data_ptr();
  by.kernels->gated_activation(p);
  return output;
}

GatedGradients run_gated_backward(const Implementation& by, const at::Tensor& grad,
                                  const at::Tensor& pre, const at::Tensor& mixture,
                                  Activation activation) {
  if (!by.kernels) {
    const auto [grad_pre, grad_mixture] =
        gated_activation_backward(grad, pre, mixture, name_of(activation));
    return {grad_pre, grad_mixture};
  }
  const GatedGradients g = {at::empty(pre.sizes(), pre.options()),
                            at::empty(mixture.sizes(), mixture.options())};
  GatedActivation p = params_of(pre, mixture, activation);
  p.grad_output = grad.data_ptr();
  p.grad_pre = g.pre.data_ptr();
  p.grad_mixture = g.mixture.data_ptr();
  by.kernels->gated_activation_backward(p);
  return g;
}

void expect_gated(const Implementation& by, at::Tensor pre, at::Tensor mixture, at::Tensor grad,
                  at::ScalarType dtype, Activation activation) {
  SCOPED_TRACE(testing::Message() << pre.sizes() << ", " << mixture.size(1) << " leaves, " << dtype
                                  << ", " << name_of(activation));
  pre = pre.to(dtype);
  mixture = mixture.to(dtype);
  grad = grad.to(dtype);
  const at::Tensor p = pre.to(at::kDouble), m = mixture.to(at::kDouble), g = grad.to(at::kDouble);
  expect_close("output", run_gated(by, pre, mixture, activation),
               run_gated(the_reference(), p, m, activation));
  const GatedGradients got = run_gated_backward(by, grad, pre, mixture, activation);
  const GatedGradients want = run_gated_backward(the_reference(), g, p, m, activation);
  expect_close("grad_pre", got.pre, want.pre);
  expect_close("grad_mixture", got.mixture, want.mixture);
}

TEST_P(SoftTreeTest, GatedActivationMatchesReference) {
  Random random(1);
  const auto expect = [&](int64_t tokens, int64_t leaves, int64_t leaf_width) {
    const at::Tensor pre = random.normal({tokens, leaves * leaf_width});
    const at::Tensor mixture = random.normal({tokens, leaves});
    const at::Tensor grad = random.normal(pre.sizes());
    for (const at::ScalarType dtype : kDtypes) {
      for (const Activation activation : kActivations) {
        expect_gated(GetParam(), pre, mixture, grad, dtype, activation);
      }
    }
  };
  for (const int64_t leaves : {1, 3, 16}) {
    for (const int64_t leaf_width : {1, 2, 9, 33}) {
      expect(1, leaves, leaf_width);
      expect(7, leaves, leaf_width);
    }
  }
  expect(300, 8, 9);  // enough for more than one thread
}

TEST_P(SoftTreeTest, GatedActivationAtItsCorners) {
  const at::Tensor pre = at::empty({1, 12}, at::kDouble);
  const double values[] = {0, -0.0, 1e-30, -1e-30, 12, -12, 90, -90, 1e4, -1e4, NAN, 1};
  std::copy(std::begin(values), std::end(values), pre.data_ptr<double>());
  const at::Tensor one = at::empty({1, 12}, at::kDouble).fill_(1);
  for (const Activation activation : kActivations) {
    expect_gated(GetParam(), pre, one, one, at::kFloat, activation);
    expect_gated(GetParam(), pre, one, one, at::kDouble, activation);
  }
}

TEST(SoftTree, KeepsLeadingDimensionsAndTakesAnyStrides) {
  Random random(1);
  const at::Tensor logits = random.normal({6, 7}), pre = random.normal({6, 24});
  const at::Tensor mixture = leaf_mixture(logits);
  const at::Tensor output = gated_activation(pre, mixture, "gelu");
  const at::Tensor grad_logits = leaf_mixture_backward(mixture, logits, mixture);
  const auto [grad_pre, grad_mixture] = gated_activation_backward(pre, pre, mixture, "gelu");
  // The same numbers with two leading dimensions, which lie last in memory.
  const auto odd = [](const at::Tensor& t) {
    return t.t().contiguous().t().view({2, 3, t.size(1)});
  };
  const auto even = [](const at::Tensor& t) { return t.view({2, 3, t.size(1)}); };
  ASSERT_FALSE(odd(pre).is_contiguous());
  expect_equal("mixture", leaf_mixture(odd(logits)), even(mixture));
  expect_equal("grad_logits", leaf_mixture_backward(odd(mixture), odd(logits), odd(mixture)),
               even(grad_logits));
  expect_equal("output", gated_activation(odd(pre), odd(mixture), "gelu"), even(output));
  const auto [odd_pre, odd_mixture] =
      gated_activation_backward(odd(pre), odd(pre), odd(mixture), "gelu");
  expect_equal("grad_pre", odd_pre, even(grad_pre));
  expect_equal("grad_mixture", odd_mixture, even(grad_mixture));
}

TEST(SoftTree, TakesZeroTokensZeroWidthAndNoLeadingDimensions) {
  const at::Tensor none = at::empty({0, 7}, at::kFloat), one = at::zeros({7}, at::kFloat);
  expect_equal("mixture", leaf_mixture(none), at::empty({0, 8}, at::kFloat));
  expect_equal("mixture", leaf_mixture(one), at::empty({8}, at::kFloat).fill_(0.125));
  const at::Tensor mixture = leaf_mixture(none);
  expect_equal("grad_logits", leaf_mixture_backward(mixture, none, mixture), none);
  const at::Tensor pre = at::empty({0, 16}, at::kFloat);
  expect_equal("output", gated_activation(pre, mixture, "relu"), pre);
  const auto [grad_pre, grad_mixture] = gated_activation_backward(pre, pre, mixture, "relu");
  expect_equal("grad_pre", grad_pre, pre);
  expect_equal("grad_mixture", grad_mixture, mixture);
  expect_equal("output", gated_activation(one, one, "identity"), one);
  const at::Tensor narrow = at::empty({5, 0}, at::kFloat), weights = at::zeros({5, 8}, at::kFloat);
  const auto [no_pre, no_mixture] = gated_activation_backward(narrow, narrow, weights, "relu");
  expect_equal("grad_pre", no_pre, narrow);
  expect_equal("grad_mixture", no_mixture, weights);
}

// --- through the dispatcher ----------------------------------------------------------------------

template <typename Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

TEST(SoftTreeAutograd, DifferentiatesOnceAndRefusesTwice) {
  Random random(1);
  const at::Tensor logits = random.normal({7, 15}).requires_grad_(true);
  const at::Tensor grad = random.normal({7, 16});
  const at::Tensor mixture = op<decltype(leaf_mixture)>("fff::leaf_mixture").call(logits);
  const auto got = torch::autograd::grad({mixture}, {logits}, {grad}, true, true);
  expect_close("grad_logits", got[0],
               run_leaf_mixture_backward(the_reference(), grad, logits.detach(), mixture.detach()));
  expect_error([&] { torch::autograd::grad({got[0].sum()}, {logits}); },
               {"derivative for fff::leaf_mixture_backward is not implemented"});
}

TEST(SoftTreeAutograd, DifferentiatesEachGatedInput) {
  Random random(1);
  const at::Tensor pre = random.normal({7, 48}), mixture = random.normal({7, 16});
  const at::Tensor grad = random.normal({7, 48});
  const GatedGradients want =
      run_gated_backward(the_reference(), grad, pre, mixture, Activation::kGelu);
  const auto call = op<decltype(gated_activation)>("fff::gated_activation");
  const auto gradient = [&](const at::Tensor& input) {
    input.requires_grad_(true);
    const auto got = torch::autograd::grad({call.call(pre, mixture, "gelu")}, {input}, {grad}, true,
                                           /*create_graph=*/true);
    expect_error([&] { torch::autograd::grad({got[0].sum()}, {input}); },
                 {"derivative for fff::gated_activation_backward is not implemented"});
    input.requires_grad_(false);
    return got[0].detach();
  };
  expect_close("pre", gradient(pre), want.pre);
  expect_close("mixture", gradient(mixture), want.mixture);
}

}  // namespace
}  // namespace fff::test
