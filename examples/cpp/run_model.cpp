// Runs a model that Python compiled with AOTInductor, and compares it with what Python computed.
//
//   run_model MODEL.pt2 EXAMPLE.pt
//
// EXAMPLE.pt holds {"input": Tensor, "output": Tensor}, as torch.save writes it. The model's fff
// operators come from libtorch_fff.so, with which this program is linked.
#include <ATen/Functions.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <cstdio>
#include <exception>
#include <fstream>
#include <iterator>
#include <vector>

namespace {

int run(const char* model, const char* example) {
  std::ifstream file(example, std::ios::binary);
  TORCH_CHECK(file, "cannot read ", example);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const auto tensors = torch::jit::pickle_load(bytes).toGenericDict();
  const at::Tensor input = tensors.at("input").toTensor();
  const at::Tensor want = tensors.at("output").toTensor();

  torch::inductor::AOTIModelPackageLoader loader(model);
  const at::Tensor got = loader.run({input}).at(0);
  const double difference = at::sub(got, want).abs().max().item<double>();
  std::printf("largest difference from Python's output: %g\n", difference);
  return at::allclose(got, want, 1e-4, 1e-5) ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: run_model MODEL.pt2 EXAMPLE.pt\n");
    return 2;
  }
  try {
    return run(argv[1], argv[2]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "run_model: %s\n", error.what());
    return 1;
  }
}
