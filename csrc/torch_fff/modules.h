// The layers FFF and UltraFFF as modules of LibTorch. Parameters have the names and layouts that
// they have in Python, so that weights go from one to the other.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>
#include <torch_fff/functional.h>

namespace torch_fff {

struct FFFOptions {
  int64_t input_width = 0;
  int64_t leaf_width = 0;
  int64_t output_width = 0;
  int64_t depth = 0;
  std::string activation = "relu";   // of the leaves
  bool train_hardened = false;       // whether training forwards are hard
  int64_t parallel_size = 1;         // trees K, whose outputs add up
  bool node_output = false;          // whether a node adds node_activation(score) * an output row
  std::string node_activation = {};  // `activation` when empty
  // In hard training: whether decisions have a gradient, and the slope of its sigmoid.
  bool straight_through = true;
  double slope = 1.0;
};

// Fast feedforward layer (arXiv 2308.14711), [..., in] -> [..., out]: a tree of 2^depth - 1
// decisions c = sigmoid(<x, w> + b) over 2^depth leaf networks act(x w1^T + b1) w2 + b2.
//
// In training a mixture of all leaves, unless train_hardened; in evaluation (`layer->eval()`) one
// path, right iff <x, w> + b >= 0, and one leaf.
//
// Parameters, with n = 2^depth - 1: node_weights [K * n, in], node_biases [K * n], w1 [K * 2^depth,
// l, in], b1 [K * 2^depth, l], w2 [K * 2^depth, l, out], b2 [K * 2^depth, out]; with node_output
// also node_outputs [K * n, out].
//
// Python's layer has more for training: dropout, region leak, noise, usage, losses of its own, a
// master leaf, a shared leaf base (`fold()` the layer there before saving its weights).
class TORCH_FFF_API FFFImpl : public torch::nn::Cloneable<FFFImpl> {
 public:
  explicit FFFImpl(FFFOptions options);

  void reset() override;
  // Draws all weights anew, uniform in +-1 / sqrt(fan-in).
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  at::Tensor forward(const at::Tensor& x);
  // One path per token and tree, in any mode.
  TreeOutput hard(const at::Tensor& x) const;
  // The mixture of all leaves, in any mode. A hardening loss is
  // `bernoulli_entropy(node_logits)`, its mean over tokens summed over nodes.
  SoftTreeOutput soft(const at::Tensor& x) const;

  FFFOptions options;
  at::Tensor node_weights, node_biases, node_outputs, w1, b1, w2, b2;

 private:
  TreeWeights weights() const;
};
TORCH_MODULE(FFF);

struct UltraFFFOptions {
  int64_t input_width = 0;
  int64_t output_width = 0;
  int64_t depth = 0;
  int64_t parallel_size = 1;  // trees K, whose outputs add up
  std::string activation = "gelu";
  bool bias = true;
  bool output_bias = false;  // whether a bias, zero at first, is added to the sum of the trees
  // Whether decisions have a gradient, and the slope of its sigmoid.
  bool straight_through = false;
  double slope = 1.0;
};

// UltraFastBERT's layer (arXiv 2311.10770), [..., in] -> [..., out]: K trees of n = 2^(depth + 1) -
// 1 neurons, of which a token visits depth + 1 each, in training too:
//
//   s = <x, node_weights[i]> + node_biases[i];  y += act(s) node_outputs[i];  i = 2i + 1 + [s > 0]
//
// Parameters: node_weights [K * n, in], node_biases [K * n] with bias, node_outputs [K * n, out],
// output_bias [out] with output_bias.
//
// Python's layer has more for training: noise, cheaper routing gradients, a shared level base
// (`fold()` the layer there before saving its weights).
class TORCH_FFF_API UltraFFFImpl : public torch::nn::Cloneable<UltraFFFImpl> {
 public:
  explicit UltraFFFImpl(UltraFFFOptions options);

  void reset() override;
  // Draws all weights anew, uniform in +-1 / sqrt(fan-in).
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  at::Tensor forward(const at::Tensor& x);

  UltraFFFOptions options;
  at::Tensor node_weights, node_biases, node_outputs, output_bias;
};
TORCH_MODULE(UltraFFF);

// Copies weights saved by Python into a module with the same parameter and buffer names, such as a
// layer above or a model that registers them under Python's names. In Python:
//
//   torch.save(dict(model.state_dict()), path)
//
// Values are converted to the module's dtype and device. A missing or unexpected name or another
// shape is a c10::Error that lists all of them; the module is unchanged then.
TORCH_FFF_API void load_state_dict(torch::nn::Module& module, const std::string& path);

}  // namespace torch_fff
