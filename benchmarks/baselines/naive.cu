// A tree of neurons as UltraFastBERT's CUDA code has it: one thread a token, which walks down and
// sums up by itself. Compiled as C++ it does the same on the host, for the tests.
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

// x [tokens, in]  node_weight [trees * nodes, in]  node_bias [trees * nodes]
// node_output [trees * nodes, out]  y [tokens, out]
struct Trees {
  const float* x;
  const float* node_weight;
  const float* node_bias;
  const float* node_output;
  float* y;
  int64_t tokens, trees, levels, in, out;
};

HOST_DEVICE inline void walk(const Trees& p, int64_t token) {
  const float* x = p.x + token * p.in;
  float* y = p.y + token * p.out;
  for (int64_t j = 0; j < p.out; ++j) {
    y[j] = 0;
  }
  const int64_t nodes = (int64_t(1) << p.levels) - 1;
  for (int64_t tree = 0; tree < p.trees; ++tree) {
    int64_t node = 0;
    for (int64_t level = 0; level < p.levels; ++level) {
      const int64_t row = tree * nodes + node;
      float score = p.node_bias[row];
      for (int64_t i = 0; i < p.in; ++i) {
        score += x[i] * p.node_weight[row * p.in + i];
      }
      const float hidden = 0.5f * score * (1 + erff(score * 0.70710678f));
      for (int64_t j = 0; j < p.out; ++j) {
        y[j] += hidden * p.node_output[row * p.out + j];
      }
      node = 2 * node + 1 + (score > 0);
    }
  }
}

#if defined(__CUDACC__)
__global__ void walk_all(Trees p) {
  const int64_t token = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (token < p.tokens) {
    walk(p, token);
  }
}

extern "C" int naive_trees(Trees p, cudaStream_t stream) {
  constexpr int threads = 128;
  walk_all<<<static_cast<unsigned>((p.tokens + threads - 1) / threads), threads, 0, stream>>>(p);
  return cudaGetLastError();
}
#else
extern "C" int naive_trees(Trees p, void*) {
  for (int64_t token = 0; token < p.tokens; ++token) {
    walk(p, token);
  }
  return 0;
}
#endif
