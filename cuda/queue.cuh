// Where an operator's kernels are queued. Its pipeline (which arrays it needs in between, which
// kernels run in which order on how many blocks) is a function of a Queue, which has
//   array<V>(count)                  memory of the operator's own, 256-byte aligned, undefined
//   scope(f)                         calls f, whose arrays may be used again for what follows
//   launch(kernel, blocks, shared)   the kernel on so many blocks with so many shared bytes
//   exclusive_sum(values, count)     running sums of int32, in place
//   kBusyBlocks                      blocks of a product that keep the GPU busy
// in order. None waits for the GPU: a pipeline can be captured into a CUDA graph.
//
// StreamQueue is a CUDA stream; SizingQueue tells how much memory a pipeline wants; the host's, for
// tests, is in tests/cpp/cuda_host.h.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <atomic>
#include <iterator>
#include <stdexcept>
#include <string>

#include "device.cuh"
#include "kernels.h"

namespace fff::cuda {

inline void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) {
    cudaGetLastError();  // or the next to ask would be told of it again
    throw std::runtime_error(std::string("torch_fff: ") + call + ": " + cudaGetErrorString(error));
  }
}

// Running sums in place by CUB, and the memory they take; in exclusive_sum.cu, for CUB compiles
// slowly.
int64_t exclusive_sum_bytes(int64_t count);
void exclusive_sum(int32_t* values, int64_t count, void* scratch, cudaStream_t stream);

template <typename Body>
__global__ void __launch_bounds__(Body::kThreads, Body::kBlocksPerProcessor)
    run_body(const __grid_constant__ Body body) {
#if __CUDA_ARCH__ >= 900
  // The kernel before this one, which waited here too, is through with its memory; the next one's
  // blocks may take the places that become free, and wait in turn.
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  body(blockIdx.x);
}

inline int current_device() {
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}
inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

// Whether kernels of this library wait as above on a device: there is code for exactly its
// architecture, and that is one which can; and the driver captures such launches into graphs.
inline bool kernels_wait(int device) {
  constexpr int kArchitectures[] = {__CUDA_ARCH_LIST__};
  constexpr int kDriver = 12030;
  const int own = 100 * device_attribute(cudaDevAttrComputeCapabilityMajor, device) +
                  10 * device_attribute(cudaDevAttrComputeCapabilityMinor, device);
  int driver = 0;
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  return own >= 900 && driver >= kDriver &&
         std::ranges::find(kArchitectures, own) != std::end(kArchitectures);
}

// Allows a kernel on a device all the shared memory there is, and asks for the same division from
// L1 for all kernels, since multiprocessors are emptied to change it.
template <typename Body>
void prepare_kernel(int device) {
  static std::atomic<uint64_t> prepared = 0;  // a bit for each device
  const uint64_t bit = uint64_t(1) << device % 64;
  if (device < 64 && (prepared & bit)) {
    return;
  }
  const auto set = [](cudaFuncAttribute attribute, int value) {
    check(cudaFuncSetAttribute(run_body<Body>, attribute, value), "cudaFuncSetAttribute");
  };
  cudaFuncAttributes attributes = {};
  check(cudaFuncGetAttributes(&attributes, run_body<Body>), "cudaFuncGetAttributes");
  set(cudaFuncAttributeMaxDynamicSharedMemorySize,
      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) -
          static_cast<int>(attributes.sharedSizeBytes));
  set(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  prepared |= bit;
}

inline constexpr int64_t kBusyBlocksOfGpu = 256;  // 132 multiprocessors with 2 each

namespace detail {
inline int64_t aligned(int64_t bytes) {
  return (bytes + 255) / 256 * 256;
}
}  // namespace detail

class SizingQueue {
 public:
  static constexpr int64_t kBusyBlocks = kBusyBlocksOfGpu;

  template <typename V>
  V* array(int64_t count) {
    // Not null: nobody reads it, but an array that is wanted is told by that from one that is not.
    V* const data = reinterpret_cast<V*>(kFirst + used_);
    used_ += detail::aligned(count * static_cast<int64_t>(sizeof(V)));
    bytes_ = std::max(bytes_, used_);
    return data;
  }
  template <typename F>
  void scope(const F& f) {
    const int64_t before = used_;
    f();
    used_ = before;
  }
  template <typename Body>
  void launch(const Body&, int64_t, int64_t) {}
  void exclusive_sum(int32_t*, int64_t count) {
    scope([&] { array<unsigned char>(exclusive_sum_bytes(count)); });
  }

  int64_t bytes() const { return bytes_; }

 private:
  static constexpr int64_t kFirst = 256;
  int64_t used_ = 0;
  int64_t bytes_ = 0;  // at most
};

class StreamQueue {
 public:
  static constexpr int64_t kBusyBlocks = kBusyBlocksOfGpu;

  StreamQueue(void* workspace, cudaStream_t stream)
      : next_(static_cast<unsigned char*>(workspace)),
        stream_(stream),
        device_(current_device()),
        early_(kernels_wait(device_)) {}

  template <typename V>
  V* array(int64_t count) {
    V* data = reinterpret_cast<V*>(next_);
    next_ += detail::aligned(count * static_cast<int64_t>(sizeof(V)));
    return data;
  }
  template <typename F>
  void scope(const F& f) {
    unsigned char* const before = next_;
    f();
    next_ = before;
  }

  template <typename Body>
  void launch(const Body& body, int64_t blocks, int64_t shared) {
    if (blocks == 0) {
      return;
    }
    prepare_kernel<Body>(device_);
    cudaLaunchAttribute early = {};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = static_cast<unsigned>(blocks);
    config.blockDim = Body::kThreads;
    config.dynamicSmemBytes = static_cast<size_t>(shared);
    config.stream = stream_;
    config.attrs = &early;
    config.numAttrs = early_ ? 1 : 0;
    check(cudaLaunchKernelEx(&config, run_body<Body>, body), "kernel launch");
  }

  void exclusive_sum(int32_t* values, int64_t count) {
    scope([&] {
      void* scratch = array<unsigned char>(exclusive_sum_bytes(count));
      cuda::exclusive_sum(values, count, scratch, stream_);
    });
  }

 private:
  unsigned char* next_;
  cudaStream_t stream_;
  int device_;
  bool early_;  // blocks may come before the end of the kernel before theirs
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

// The operator whose pipeline is run(params, queue), a lambda without captures.
template <typename Params, typename Run>
constexpr Kernel<Params> kernel(Run) {
  return {[](const Params& p) {
            SizingQueue queue;
            Run()(p, queue);
            return queue.bytes();
          },
          [](const Params& p, void* workspace, cudaStream_t stream) {
            StreamQueue queue(workspace, stream);
            Run()(p, queue);
          }};
}

}  // namespace fff::cuda
