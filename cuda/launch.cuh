// From a kernel body to the GPU: launch, workspace, choice of type, errors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "group.cuh"

namespace fff::cuda {

inline void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("torch_fff: ") + call + ": " + cudaGetErrorString(error));
  }
}

inline constexpr int kWarpsPerBlock = 4;

template <typename Body>
__global__ void __launch_bounds__(kWarpsPerBlock* Warp::size)
    for_each_item(Body body, int64_t items) {
  const Warp warp{static_cast<int>(threadIdx.x) % Warp::size};
  const int64_t first = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / Warp::size;
  for (int64_t item = first; item < items; item += int64_t(gridDim.x) * kWarpsPerBlock) {
    body(item, warp);
  }
}

// Calls body(item, warp) for items 0 ... items - 1.
template <typename Body>
void launch(const Body& body, int64_t items, cudaStream_t stream) {
  if (items == 0) {
    return;
  }
  constexpr int64_t most_blocks = int64_t(1) << 20;
  const int64_t blocks = std::min((items + kWarpsPerBlock - 1) / kWarpsPerBlock, most_blocks);
  for_each_item<<<static_cast<unsigned>(blocks), kWarpsPerBlock * Warp::size, 0, stream>>>(body,
                                                                                           items);
  check(cudaGetLastError(), "kernel launch");
}

// Memory for the kernels that are queued on one stream between its construction and destruction.
template <typename A>
class Workspace {
 public:
  Workspace(int64_t count, cudaStream_t stream) : stream_(stream) {
    if (count > 0) {
      check(cudaMallocAsync(&data_, count * sizeof(A), stream), "cudaMallocAsync");
    }
  }
  ~Workspace() {
    if (data_) {
      cudaFreeAsync(data_, stream_);  // a destructor cannot throw: CUDA's next call reports
    }
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  A* data() const { return static_cast<A*>(data_); }

 private:
  cudaStream_t stream_;
  void* data_ = nullptr;
};

// Calls f with a value of the type that dtype names.
template <typename F>
void dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat:
      return f(float());
    case DType::kDouble:
      return f(double());
    case DType::kBFloat16:
      return f(__nv_bfloat16());
    case DType::kHalf:
      return f(__half());
  }
}

}  // namespace fff::cuda
