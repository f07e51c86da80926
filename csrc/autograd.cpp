// Gradients. Each backward pass is an operator of its own, so that it can be traced; it refuses to
// be differentiated again.

#include <ATen/ops/_sparse_coo_tensor_unsafe.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "gated_activation.h"
#include "leaf_mixture.h"
#include "linear.h"
#include "sparse_leaves.h"
#include "tree.h"

namespace fff {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

template <typename Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

OptionalTensor or_nullopt(const at::Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}

// Which of N inputs, the saved ones from `saved` on, want a gradient. The engine counts only the
// tensors that were given.
template <size_t N>
std::array<bool, N> wanted_gradients(AutogradContext* ctx, variable_list::const_iterator saved) {
  std::array<bool, N> wanted = {};
  for (size_t input = 0, edge = 0; input < N; ++input) {
    wanted[input] = saved[input].defined() && ctx->needs_input_grad(edge++);
  }
  return wanted;
}

// A gradient for each of the forward pass's `arguments`, of which the first N are differentiable.
template <size_t N, typename Gradients>
variable_list gradients_of_inputs(Gradients&& gradients, const std::array<bool, N>& wanted,
                                  size_t arguments) {
  std::array<at::Tensor, N> by_input =
      std::apply([](auto&&... t) { return std::array<at::Tensor, N>{std::move(t)...}; },
                 std::forward<Gradients>(gradients));
  variable_list result(arguments);
  for (size_t i = 0; i < N; ++i) {
    if (wanted[i]) {
      result[i] = std::move(by_input[i]);
    }
  }
  return result;
}

class LeafMixtureFunction : public torch::autograd::Function<LeafMixtureFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& node_logits) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    static const auto call = op<decltype(leaf_mixture)>("fff::leaf_mixture");
    at::Tensor mixture = call.call(node_logits);
    ctx->save_for_backward({node_logits, mixture});
    return mixture;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto call = op<decltype(leaf_mixture_backward)>("fff::leaf_mixture_backward");
    const variable_list saved = ctx->get_saved_variables();
    return {call.call(grads[0], saved[0], saved[1])};
  }
};

class GatedActivationFunction : public torch::autograd::Function<GatedActivationFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& pre, const at::Tensor& mixture,
                            const std::string& activation) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    static const auto call = op<decltype(gated_activation)>("fff::gated_activation");
    ctx->save_for_backward({pre, mixture});
    ctx->saved_data["activation"] = activation;
    return call.call(pre, mixture, activation);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto call =
        op<decltype(gated_activation_backward)>("fff::gated_activation_backward");
    const variable_list saved = ctx->get_saved_variables();
    auto [grad_pre, grad_mixture] =
        call.call(grads[0], saved[0], saved[1], ctx->saved_data["activation"].toStringView());
    return {grad_pre, grad_mixture, at::Tensor()};
  }
};

class LinearFunction : public torch::autograd::Function<LinearFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                            const OptionalTensor& bias) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    static const auto call = op<decltype(linear)>("fff::linear");
    ctx->save_for_backward({x, weight});
    ctx->saved_data["biased"] = bias.has_value();
    return call.call(x, weight, bias);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto call = op<decltype(linear_backward)>("fff::linear_backward");
    const variable_list saved = ctx->get_saved_variables();
    const std::array<bool, 3> wanted = {
        ctx->needs_input_grad(0), ctx->needs_input_grad(1),
        ctx->saved_data["biased"].toBool() && ctx->needs_input_grad(2)};
    auto [x, weight, bias] = call.call(grads[0], saved[0], saved[1], wanted);
    return {wanted[0] ? x : at::Tensor(), wanted[1] ? weight : at::Tensor(),
            wanted[2] ? bias : at::Tensor()};
  }
};

// The gradient whose rows `ids` [m] are `values` [m, ...], and all others 0.
at::Tensor sparse_rows(const at::Tensor& ids, const at::Tensor& values, at::IntArrayRef sizes) {
  return at::_sparse_coo_tensor_unsafe(ids.unsqueeze(0), values, sizes,
                                       values.options().layout(at::kSparse),
                                       /*is_coalesced=*/true);
}

template <typename... Tensors>
std::array<at::Tensor, sizeof...(Tensors)> to_array(std::tuple<Tensors...> tensors) {
  return std::apply([](auto&... t) { return std::array{std::move(t)...}; }, tensors);
}

class SparseLeavesFunction : public torch::autograd::Function<SparseLeavesFunction> {
 public:
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& mixture,
                            const at::Tensor& w1, const OptionalTensor& b1, const at::Tensor& w2,
                            const OptionalTensor& b2, double prune, const std::string& activation) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    static const auto call = op<decltype(sparse_leaves)>("fff::sparse_leaves");
    ctx->save_for_backward(
        {x, mixture, w1, b1.value_or(at::Tensor()), w2, b2.value_or(at::Tensor())});
    ctx->saved_data["prune"] = prune;
    ctx->saved_data["activation"] = activation;
    return call.call(x, mixture, w1, b1, w2, b2, prune, activation);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    static const auto call = op<decltype(sparse_leaves_backward)>("fff::sparse_leaves_backward");
    const variable_list saved = ctx->get_saved_variables();
    const std::array<bool, 6> wanted = wanted_gradients<6>(ctx, saved.begin());
    auto gradients = call.call(grads[0], saved[0], saved[1], saved[2], or_nullopt(saved[3]),
                               saved[4], or_nullopt(saved[5]), ctx->saved_data["prune"].toDouble(),
                               ctx->saved_data["activation"].toStringView(),
                               {wanted[0], wanted[2] || wanted[3] || wanted[4] || wanted[5]});
    return gradients_of_inputs(std::move(gradients), wanted, 8);
  }
};

class TreeFunction : public torch::autograd::Function<TreeFunction> {
 public:
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x,
                               const at::Tensor& node_weight, const OptionalTensor& node_bias,
                               const OptionalTensor& node_output, const OptionalTensor& w1,
                               const OptionalTensor& b1, const OptionalTensor& w2,
                               const OptionalTensor& b2, const OptionalTensor& noise,
                               const OptionalTensor& leaf_scale, const OptionalTensor& alternates,
                               int64_t trees, bool tie_right, const std::string& node_activation,
                               const std::string& leaf_activation, bool straight_through,
                               double slope, double min_slope, bool row_sparse_grad) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    static const auto call = op<decltype(tree)>("fff::tree");
    auto [output, scores, leaf] =
        call.call(x, node_weight, node_bias, node_output, w1, b1, w2, b2, noise, leaf_scale,
                  alternates, trees, tie_right, node_activation, leaf_activation, straight_through,
                  slope, min_slope, row_sparse_grad);
    const auto or_undefined = [](const OptionalTensor& t) { return t.value_or(at::Tensor()); };
    ctx->save_for_backward({scores, leaf, x, node_weight, or_undefined(node_bias),
                            or_undefined(node_output), or_undefined(w1), or_undefined(b1),
                            or_undefined(w2), or_undefined(b2), or_undefined(noise),
                            or_undefined(leaf_scale), or_undefined(alternates)});
    ctx->saved_data["trees"] = trees;
    ctx->saved_data["tie_right"] = tie_right;
    ctx->saved_data["node_activation"] = node_activation;
    ctx->saved_data["leaf_activation"] = leaf_activation;
    ctx->saved_data["straight_through"] = straight_through;
    ctx->saved_data["slope"] = slope;
    ctx->saved_data["min_slope"] = min_slope;
    ctx->saved_data["row_sparse_grad"] = row_sparse_grad;
    ctx->mark_non_differentiable({leaf});
    ctx->set_materialize_grads(false);
    return {output, scores, leaf};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const variable_list saved = ctx->get_saved_variables();
    const std::array<bool, 8> wanted = wanted_gradients<8>(ctx, saved.begin() + 2);
    const auto call = [&](const auto& backward) {
      return backward.call(
          or_nullopt(grads[0]), or_nullopt(grads[1]), saved[0], saved[1], saved[2], saved[3],
          or_nullopt(saved[4]), or_nullopt(saved[5]), or_nullopt(saved[6]), or_nullopt(saved[7]),
          or_nullopt(saved[8]), or_nullopt(saved[9]), or_nullopt(saved[10]), or_nullopt(saved[11]),
          or_nullopt(saved[12]), ctx->saved_data["trees"].toInt(),
          ctx->saved_data["tie_right"].toBool(), ctx->saved_data["node_activation"].toStringView(),
          ctx->saved_data["leaf_activation"].toStringView(),
          ctx->saved_data["straight_through"].toBool(), ctx->saved_data["slope"].toDouble(),
          ctx->saved_data["min_slope"].toDouble(),
          {wanted[0], wanted[1] || wanted[2] || wanted[3],
           wanted[4] || wanted[5] || wanted[6] || wanted[7]});
    };
    std::array<at::Tensor, 8> by_input;
    if (ctx->saved_data["row_sparse_grad"].toBool()) {
      static const auto backward = op<decltype(tree_backward_rows)>("fff::tree_backward_rows");
      const auto rows = to_array(call(backward));
      by_input[0] = rows[0];
      for (size_t i = 1; i < by_input.size(); ++i) {
        if (wanted[i]) {
          by_input[i] = sparse_rows(rows[i < 4 ? 1 : 2], rows[2 + i], saved[2 + i].sizes());
        }
      }
    } else {
      static const auto backward = op<decltype(tree_backward)>("fff::tree_backward");
      by_input = to_array(call(backward));
    }
    return gradients_of_inputs(std::move(by_input), wanted, 19);
  }
};

at::Tensor linear_autograd(const at::Tensor& x, const at::Tensor& weight,
                           const OptionalTensor& bias) {
  return LinearFunction::apply(x, weight, bias);
}

at::Tensor leaf_mixture_autograd(const at::Tensor& node_logits) {
  return LeafMixtureFunction::apply(node_logits);
}

at::Tensor gated_activation_autograd(const at::Tensor& pre, const at::Tensor& mixture,
                                     std::string_view activation) {
  return GatedActivationFunction::apply(pre, mixture, std::string(activation));
}

at::Tensor sparse_leaves_autograd(const at::Tensor& x, const at::Tensor& mixture,
                                  const at::Tensor& w1, const OptionalTensor& b1,
                                  const at::Tensor& w2, const OptionalTensor& b2, double prune,
                                  std::string_view activation) {
  return SparseLeavesFunction::apply(x, mixture, w1, b1, w2, b2, prune, std::string(activation));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> tree_autograd(
    const at::Tensor& x, const at::Tensor& node_weight, const OptionalTensor& node_bias,
    const OptionalTensor& node_output, const OptionalTensor& w1, const OptionalTensor& b1,
    const OptionalTensor& w2, const OptionalTensor& b2, const OptionalTensor& noise,
    const OptionalTensor& leaf_scale, const OptionalTensor& alternates, int64_t trees,
    bool tie_right, std::string_view node_activation, std::string_view leaf_activation,
    bool straight_through, double slope, double min_slope, bool row_sparse_grad) {
  variable_list out = TreeFunction::apply(
      x, node_weight, node_bias, node_output, w1, b1, w2, b2, noise, leaf_scale, alternates, trees,
      tie_right, std::string(node_activation), std::string(leaf_activation), straight_through,
      slope, min_slope, row_sparse_grad);
  return {out[0], out[1], out[2]};
}

}  // namespace
}  // namespace fff

TORCH_LIBRARY_IMPL(fff, Autograd, m) {
  m.impl("leaf_mixture", TORCH_FN(fff::leaf_mixture_autograd));
  m.impl("gated_activation", TORCH_FN(fff::gated_activation_autograd));
  m.impl("linear", TORCH_FN(fff::linear_autograd));
  m.impl("tree", TORCH_FN(fff::tree_autograd));
  m.impl("leaf_mixture_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("gated_activation_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("linear_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("sparse_leaves", TORCH_FN(fff::sparse_leaves_autograd));
  m.impl("sparse_leaves_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("sparse_linear_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("tree_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("tree_backward_rows", torch::autograd::autogradNotImplementedFallback());
  m.impl("descend", torch::autograd::autogradNotImplementedFallback());
}
