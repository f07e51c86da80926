#include "modules.h"

#include <torch/csrc/jit/serialization/pickle.h>
#include <torch/nn/init.h>
#include <torch/types.h>

#include <cmath>
#include <fstream>
#include <iterator>
#include <map>

namespace torch_fff {
namespace {

void check_counts(const char* owner,
                  std::initializer_list<std::tuple<const char*, int64_t, int64_t>> counts) {
  for (const auto& [argument, value, minimum] : counts) {
    TORCH_CHECK_VALUE(value >= minimum, owner, ": ", argument, ": expected an integer >= ", minimum,
                      ", got ", value);
  }
}

void check_slope(const char* owner, double slope) {
  TORCH_CHECK_VALUE(slope > 0 && std::isfinite(slope), owner,
                    ": slope: expected a finite number > 0, got ", slope);
}

// Heap-ordered trees of more levels do not fit any memory.
constexpr int64_t kMaxDepth = 40;

void check_depth(const char* owner, int64_t depth) {
  TORCH_CHECK_VALUE(0 <= depth && depth <= kMaxDepth, owner, ": depth: expected an integer in [0, ",
                    kMaxDepth, "], got ", depth);
}

void draw_uniform(const at::Tensor& weight, int64_t fan_in) {
  if (weight.defined()) {
    const double bound = 1 / std::sqrt(static_cast<double>(fan_in));
    torch::nn::init::uniform_(weight, -bound, bound);
  }
}

}  // namespace

FFFImpl::FFFImpl(FFFOptions o) : options(std::move(o)) {
  check_counts("FFF", {{"input_width", options.input_width, 1},
                       {"leaf_width", options.leaf_width, 1},
                       {"output_width", options.output_width, 1},
                       {"parallel_size", options.parallel_size, 1}});
  check_depth("FFF", options.depth);
  check_slope("FFF", options.slope);
  if (options.node_activation.empty()) {
    options.node_activation = options.activation;
  }
  FFFImpl::reset();
}

void FFFImpl::reset() {
  const auto& o = options;
  const int64_t leaves = o.parallel_size << o.depth;
  const int64_t nodes = leaves - o.parallel_size;
  const auto parameter = [&](const char* name, at::IntArrayRef shape) {
    return register_parameter(name, torch::empty(shape));
  };
  node_weights = parameter("node_weights", {nodes, o.input_width});
  node_biases = parameter("node_biases", {nodes});
  if (o.node_output) {
    node_outputs = parameter("node_outputs", {nodes, o.output_width});
  }
  w1 = parameter("w1", {leaves, o.leaf_width, o.input_width});
  b1 = parameter("b1", {leaves, o.leaf_width});
  w2 = parameter("w2", {leaves, o.leaf_width, o.output_width});
  b2 = parameter("b2", {leaves, o.output_width});
  reset_parameters();
}

void FFFImpl::reset_parameters() {
  const int64_t hidden = options.parallel_size * options.leaf_width;
  for (const at::Tensor& weight : {node_weights, node_biases, w1, b1}) {
    draw_uniform(weight, options.input_width);
  }
  for (const at::Tensor& weight : {w2, b2}) {
    draw_uniform(weight, hidden);
  }
  draw_uniform(node_outputs, hidden + options.parallel_size * options.depth);
}

void FFFImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_fff::FFF(" << options.input_width << ", " << options.leaf_width << ", "
         << options.output_width << ", depth=" << options.depth
         << ", parallel_size=" << options.parallel_size << ", activation=" << options.activation
         << ")";
}

at::Tensor FFFImpl::forward(const at::Tensor& x) {
  return is_training() && !options.train_hardened ? soft(x).output : hard(x).output;
}

TreeOutput FFFImpl::hard(const at::Tensor& x) const {
  return tree(x, weights(),
              {.trees = options.parallel_size,
               .node_activation = options.node_activation,
               .leaf_activation = options.activation,
               .straight_through = options.straight_through,
               .slope = options.slope});
}

SoftTreeOutput FFFImpl::soft(const at::Tensor& x) const {
  return soft_tree(x, weights(),
                   {.trees = options.parallel_size,
                    .node_activation = options.node_activation,
                    .leaf_activation = options.activation});
}

TreeWeights FFFImpl::weights() const {
  return {node_weights, node_biases, node_outputs, w1, b1, w2, b2};
}

UltraFFFImpl::UltraFFFImpl(UltraFFFOptions o) : options(std::move(o)) {
  check_counts("UltraFFF", {{"input_width", options.input_width, 1},
                            {"output_width", options.output_width, 1},
                            {"parallel_size", options.parallel_size, 1}});
  check_depth("UltraFFF", options.depth);
  check_slope("UltraFFF", options.slope);
  UltraFFFImpl::reset();
}

void UltraFFFImpl::reset() {
  const auto& o = options;
  const int64_t nodes = o.parallel_size * ((int64_t(2) << o.depth) - 1);
  node_weights = register_parameter("node_weights", torch::empty({nodes, o.input_width}));
  if (o.bias) {
    node_biases = register_parameter("node_biases", torch::empty({nodes}));
  }
  node_outputs = register_parameter("node_outputs", torch::empty({nodes, o.output_width}));
  if (o.output_bias) {
    output_bias = register_parameter("output_bias", torch::empty({o.output_width}));
  }
  reset_parameters();
}

void UltraFFFImpl::reset_parameters() {
  draw_uniform(node_weights, options.input_width);
  draw_uniform(node_biases, options.input_width);
  draw_uniform(node_outputs, options.parallel_size * (options.depth + 1));
  if (output_bias.defined()) {
    torch::nn::init::zeros_(output_bias);
  }
}

void UltraFFFImpl::pretty_print(std::ostream& stream) const {
  stream << "torch_fff::UltraFFF(" << options.input_width << ", " << options.output_width
         << ", depth=" << options.depth << ", parallel_size=" << options.parallel_size
         << ", activation=" << options.activation << ")";
}

at::Tensor UltraFFFImpl::forward(const at::Tensor& x) {
  const at::Tensor output =
      tree(x, {.node_weight = node_weights, .node_bias = node_biases, .node_output = node_outputs},
           {.trees = options.parallel_size,
            .tie_right = false,
            .node_activation = options.activation,
            .straight_through = options.straight_through,
            .slope = options.slope})
          .output;
  return output_bias.defined() ? output + output_bias.to(output.scalar_type()) : output;
}

void load_state_dict(torch::nn::Module& module, const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK_VALUE(file, "load_state_dict: path: expected a readable file, got '", path, "'");
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const c10::IValue content = torch::jit::pickle_load(bytes);
  TORCH_CHECK_VALUE(content.isGenericDict(),
                    "load_state_dict: path: expected what Python's "
                    "torch.save(dict(model.state_dict()), path) writes, got another object in '",
                    path, "'");
  std::map<std::string, at::Tensor> saved;
  for (const auto& entry : content.toGenericDict()) {
    saved.emplace(entry.key().toStringRef(), entry.value().toTensor());
  }

  std::vector<std::pair<at::Tensor, at::Tensor>> copies;  // to, from
  std::ostringstream problems;
  const auto match = [&](const std::string& name, const at::Tensor& own) {
    const auto found = saved.find(name);
    if (found == saved.end()) {
      problems << "; " << name << ": missing";
      return;
    }
    if (found->second.sizes() != own.sizes()) {
      problems << "; " << name << ": expected shape " << own.sizes() << ", got "
               << found->second.sizes();
    }
    copies.emplace_back(own, found->second);
    saved.erase(found);
  };
  for (const auto& item : module.named_parameters()) {
    match(item.key(), item.value());
  }
  for (const auto& item : module.named_buffers()) {
    match(item.key(), item.value());
  }
  for (const auto& [name, value] : saved) {
    problems << "; " << name << ": unexpected";
  }
  TORCH_CHECK_VALUE(problems.str().empty(), "load_state_dict: '", path, "' does not fit the module",
                    problems.str());
  const at::NoGradGuard no_grad;
  for (auto& [own, value] : copies) {
    own.copy_(value);
  }
}

}  // namespace torch_fff
