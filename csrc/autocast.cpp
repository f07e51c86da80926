// Under autocast x and the weights are cast to the autocast dtype; scores, noise,
// leaf_scale and alternates stay in the accumulation type.

#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "check.h"
#include "sparse_leaves.h"
#include "tree.h"

namespace fff {
namespace {

// Casts what has autocast's device and a floating dtype, with autocast's weight cache.
class Cast {
 public:
  explicit Cast(c10::DeviceType device)
      : device_(device), dtype_(at::autocast::get_autocast_dtype(device)) {}

  at::Tensor operator()(const at::Tensor& t) const {
    return at::autocast::cached_cast(dtype_, t, device_);
  }
  OptionalTensor operator()(const OptionalTensor& t) const {
    return defined(t) ? OptionalTensor((*this)(*t)) : std::nullopt;
  }

 private:
  c10::DeviceType device_;
  at::ScalarType dtype_;
};

// What multiplies or shifts the scores of x has their type. Autocast leaves float64 alone.
OptionalTensor like_scores(const OptionalTensor& t, const at::Tensor& x) {
  return defined(t) ? OptionalTensor(t->to(accumulation_type(x.scalar_type()))) : std::nullopt;
}

template <c10::DeviceType device>
std::tuple<at::Tensor, at::Tensor, at::Tensor> tree_autocast(
    const at::Tensor& x, const at::Tensor& node_weight, const OptionalTensor& node_bias,
    const OptionalTensor& node_output, const OptionalTensor& w1, const OptionalTensor& b1,
    const OptionalTensor& w2, const OptionalTensor& b2, const OptionalTensor& noise,
    const OptionalTensor& leaf_scale, const OptionalTensor& alternates, int64_t trees,
    bool tie_right, std::string_view node_activation, std::string_view leaf_activation,
    bool straight_through, double slope, double min_slope, bool row_sparse_grad) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  static const auto call =
      c10::Dispatcher::singleton().findSchemaOrThrow("fff::tree", "").typed<decltype(tree)>();
  const Cast cast(device);
  const at::Tensor own_node_weight = cast(node_weight);
  // The gradient of a cast is dense, and the cast itself has a price for every row.
  TORCH_CHECK(
      !row_sparse_grad || !at::GradMode::is_enabled() || own_node_weight.is_same(node_weight),
      "fff::tree: row_sparse_grad must be false where autocast casts the weights, got true "
      "with node_weight ",
      node_weight.scalar_type());
  return call.call(cast(x), own_node_weight, cast(node_bias), cast(node_output), cast(w1), cast(b1),
                   cast(w2), cast(b2), like_scores(noise, x), like_scores(leaf_scale, x),
                   like_scores(alternates, x), trees, tie_right, node_activation, leaf_activation,
                   straight_through, slope, min_slope, row_sparse_grad);
}

template <c10::DeviceType device>
std::tuple<at::Tensor, at::Tensor> descend_autocast(const at::Tensor& x,
                                                    const at::Tensor& node_weight,
                                                    const OptionalTensor& node_bias,
                                                    const OptionalTensor& noise, int64_t trees,
                                                    bool tie_right) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  static const auto call =
      c10::Dispatcher::singleton().findSchemaOrThrow("fff::descend", "").typed<decltype(descend)>();
  const Cast cast(device);
  return call.call(cast(x), cast(node_weight), cast(node_bias), like_scores(noise, x), trees,
                   tie_right);
}

template <c10::DeviceType device>
at::Tensor gated_activation_autocast(const at::Tensor& pre, const at::Tensor& mixture,
                                     std::string_view activation) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  static const auto call =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("fff::gated_activation", "")
          .typed<at::Tensor(const at::Tensor&, const at::Tensor&, std::string_view)>();
  const Cast cast(device);
  return call.call(cast(pre), cast(mixture), activation);
}

template <c10::DeviceType device>
at::Tensor sparse_leaves_autocast(const at::Tensor& x, const at::Tensor& mixture,
                                  const at::Tensor& w1, const OptionalTensor& b1,
                                  const at::Tensor& w2, const OptionalTensor& b2, double prune,
                                  std::string_view activation) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(
      at::autocast::get_autocast_dispatch_key_from_device_type(device));
  static const auto call = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fff::sparse_leaves", "")
                               .typed<decltype(sparse_leaves)>();
  const Cast cast(device);
  return call.call(cast(x), cast(mixture), cast(w1), cast(b1), cast(w2), cast(b2), prune,
                   activation);
}

template <c10::DeviceType device>
void register_casts(torch::Library& m) {
  m.impl("tree", tree_autocast<device>);
  m.impl("descend", descend_autocast<device>);
  m.impl("gated_activation", gated_activation_autocast<device>);
  m.impl("sparse_leaves", sparse_leaves_autocast<device>);
}

}  // namespace
}  // namespace fff

TORCH_LIBRARY_IMPL(fff, AutocastCPU, m) {
  fff::register_casts<c10::DeviceType::CPU>(m);
}

TORCH_LIBRARY_IMPL(fff, AutocastCUDA, m) {
  fff::register_casts<c10::DeviceType::CUDA>(m);
}
