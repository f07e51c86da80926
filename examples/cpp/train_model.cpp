// The model of export_model.py written with LibTorch: takes Python's weights, agrees with what
// Python computed, and is trained on.
//
//   train_model WEIGHTS.pt EXAMPLE.pt
#include <torch/csrc/jit/serialization/pickle.h>
#include <torch/nn/modules/normalization.h>
#include <torch/optim/adam.h>
#include <torch_fff/torch_fff.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <vector>

namespace {

constexpr int64_t kWidth = 64;

// Names and sizes are those of the Python model: so its state dict fits.
struct Model : torch::nn::Module {
  torch::nn::LayerNorm norm{torch::nn::LayerNormOptions({kWidth})};
  torch_fff::FFF fff{torch_fff::FFFOptions{.input_width = kWidth,
                                           .leaf_width = 8,
                                           .output_width = kWidth,
                                           .depth = 4,
                                           .train_hardened = true}};
  torch_fff::UltraFFF ultra{torch_fff::UltraFFFOptions{
      .input_width = kWidth, .output_width = kWidth, .depth = 5, .parallel_size = 2}};

  Model() {
    register_module("norm", norm);
    register_module("fff", fff);
    register_module("ultra", ultra);
  }

  at::Tensor forward(at::Tensor x) {
    x = x + fff->forward(norm->forward(x));
    return x + ultra->forward(x);
  }
};

int run(const char* weights, const char* example) {
  std::ifstream file(example, std::ios::binary);
  TORCH_CHECK(file, "cannot read ", example);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const auto tensors = torch::jit::pickle_load(bytes).toGenericDict();
  const at::Tensor input = tensors.at("input").toTensor();
  const at::Tensor want = tensors.at("output").toTensor();

  Model model;
  torch_fff::load_state_dict(model, weights);
  model.eval();
  const at::Tensor got = model.forward(input);
  std::printf("largest difference from Python's output: %g\n",
              (got - want).abs().max().item<double>());
  if (!at::allclose(got, want, 1e-4, 1e-5)) {
    return 1;
  }

  const at::Tensor target = input.flip(1);
  const auto loss_of = [&] { return (model.forward(input) - target).square().mean(); };
  const double before = loss_of().item<double>();
  model.train();
  torch::optim::Adam optimizer(model.parameters(), torch::optim::AdamOptions(1e-2));
  for (int step = 0; step < 50; ++step) {
    optimizer.zero_grad();
    loss_of().backward();
    optimizer.step();
  }
  model.eval();
  const double after = loss_of().item<double>();
  std::printf("loss before and after 50 steps: %g, %g\n", before, after);
  return after < before ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: train_model WEIGHTS.pt EXAMPLE.pt\n");
    return 2;
  }
  try {
    return run(argv[1], argv[2]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "train_model: %s\n", error.what());
    return 1;
  }
}
