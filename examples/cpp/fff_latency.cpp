// How long one UltraFFF 1x11 (768 -> 4095 neurons -> 768, 12 visited) takes from C++, and how long
// the dense layer of equal width takes: the better of ATen's products and oneDNN's with prepared
// weights.
//
//   fff_latency [rounds = 31]
//
// All contenders take turns; times are medians over the rounds, in inference mode.
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/InferenceMode.h>
#include <torch/version.h>
#include <torch_fff/torch_fff.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

namespace {

constexpr int64_t kWidth = 768;
constexpr int64_t kDepth = 11;
constexpr int64_t kNeurons = (2 << kDepth) - 1;

// The neuron tree said with ATen alone, level by level.
at::Tensor walk(const at::Tensor& x, const torch_fff::UltraFFFImpl& layer) {
  at::Tensor node = at::zeros({x.size(0)}, at::kLong), output = at::zeros_like(x);
  for (int64_t level = 0; level <= kDepth; ++level) {
    const at::Tensor weight = layer.node_weights.index_select(0, node);
    const at::Tensor score = at::add((x * weight).sum(1), layer.node_biases.index_select(0, node));
    output += at::gelu(score).unsqueeze(1) * layer.node_outputs.index_select(0, node);
    node = node * 2 + 1 + score.gt(0);
  }
  return output;
}

struct Dense {
  at::Tensor w1 = at::randn({kNeurons, kWidth}) / 28, b1 = at::randn({kNeurons}) / 28;
  at::Tensor w2 = at::randn({kWidth, kNeurons}) / 64;

  at::Tensor operator()(const at::Tensor& x) const {
    return at::linear(at::gelu(at::linear(x, w1, b1)), w2);
  }
};

// oneDNN lays the weights out for a number of tokens and fuses the activation.
class PreparedDense {
 public:
  PreparedDense(const Dense& dense, int64_t tokens) : b1_(dense.b1) {
    const auto prepare = op<Prepare>("mkldnn::_reorder_linear_weight");
    w1_ = prepare.call(dense.w1, tokens);
    w2_ = prepare.call(dense.w2, tokens);
  }

  at::Tensor operator()(const at::Tensor& x) const {
    return linear_.call(linear_.call(x, w1_, b1_, "gelu", scalars_, "none"), w2_, std::nullopt,
                        "none", scalars_, "none");
  }

 private:
  using Scalars = c10::List<std::optional<at::Scalar>>;
  using Prepare = at::Tensor(const at::Tensor&, std::optional<c10::SymInt>);
  using Linear = at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                            std::string_view, Scalars, std::optional<std::string_view>);

  template <typename Signature>
  static c10::TypedOperatorHandle<Signature> op(const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
  }

  c10::TypedOperatorHandle<Linear> linear_ = op<Linear>("mkldnn::_linear_pointwise");
  Scalars scalars_;
  at::Tensor w1_, b1_, w2_;
};

using Call = std::function<at::Tensor(const at::Tensor&)>;

struct Contender {
  const char* name;
  Call call;
  std::vector<double> microseconds = {};  // of a call, by round

  double median() const {
    std::vector<double> sorted = microseconds;
    std::nth_element(sorted.begin(), sorted.begin() + sorted.size() / 2, sorted.end());
    return sorted[sorted.size() / 2];
  }
};

double time_calls(const Call& call, const std::vector<at::Tensor>& inputs, int calls) {
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < calls; ++i) {
    call(inputs[i % inputs.size()]);
  }
  const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - begin;
  return took.count() / calls;
}

// Adds a measurement of each contender per round, 10 ms long or one call.
void measure(std::vector<Contender>& contenders, const std::vector<at::Tensor>& inputs,
             int rounds) {
  std::vector<int> calls;
  for (const Contender& c : contenders) {
    time_calls(c.call, inputs, 3);
    const double once = time_calls(c.call, inputs, 5);
    calls.push_back(std::max(1, static_cast<int>(1e4 / once)));
  }
  for (int round = 0; round < rounds; ++round) {
    for (size_t i = 0; i < contenders.size(); ++i) {
      // The contender before may have swept this one's weights out of the caches.
      time_calls(contenders[i].call, inputs, inputs.size());
      contenders[i].microseconds.push_back(time_calls(contenders[i].call, inputs, calls[i]));
    }
  }
}

void check(const char* what, const at::Tensor& got, const at::Tensor& want) {
  TORCH_CHECK(at::allclose(got, want, 1e-4, 1e-5), what, " is wrong");
}

void run(int64_t tokens, int rounds) {
  torch_fff::UltraFFF layer(
      torch_fff::UltraFFFOptions{.input_width = kWidth, .output_width = kWidth, .depth = kDepth});
  layer->eval();
  const torch_fff::TreeWeights weights = {.node_weight = layer->node_weights,
                                          .node_bias = layer->node_biases,
                                          .node_output = layer->node_outputs};
  const torch_fff::TreeOptions options = {.tie_right = false, .node_activation = "gelu"};
  const Dense dense;
  const PreparedDense prepared(dense, tokens);

  std::vector<at::Tensor> inputs;  // several, so that not one path stays in the caches
  for (int i = 0; i < 8; ++i) {
    inputs.push_back(at::randn({tokens, kWidth}));
  }
  check("UltraFFF", layer->forward(inputs[0]), walk(inputs[0], *layer));
  check("the prepared dense layer", prepared(inputs[0]), dense(inputs[0]));

  std::vector<Contender> contenders = {
      {"UltraFFF 1x11, module", [&](const at::Tensor& x) { return layer->forward(x); }},
      {"UltraFFF 1x11, operator",
       [&](const at::Tensor& x) { return torch_fff::tree(x, weights, options).output; }},
      {"an output alone (at::empty_like)", [&](const at::Tensor& x) { return at::empty_like(x); }},
      {"dense 4095, at::linear", dense},
      {"dense 4095, oneDNN prepared", prepared}};
  measure(contenders, inputs, rounds);

  std::printf("\n%lld token%s\n", static_cast<long long>(tokens), tokens == 1 ? "" : "s");
  for (const Contender& c : contenders) {
    std::printf("  %-34s %10.2f us\n", c.name, c.median());
  }
  const double best = std::min(contenders[3].median(), contenders[4].median());
  std::printf("  %-34s %10.1f x\n", "faster than the best dense layer",
              best / contenders[0].median());
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 31;
  if (rounds < 1) {
    std::fprintf(stderr, "usage: fff_latency [rounds = 31]\n");
    return 2;
  }
  const c10::InferenceMode inference;
  std::printf("torch %s, %s, %d threads\n", TORCH_VERSION, at::get_cpu_capability().c_str(),
              at::get_num_threads());
  for (const int64_t tokens : {1, 8, 64}) {
    run(tokens, rounds);
  }
  return 0;
}
