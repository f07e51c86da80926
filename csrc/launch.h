// From an operator to the kernel of its device: every operator ends in one call of `launch`.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "cpu/kernels.h"
#ifdef FFF_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../cuda/kernels.h"
#define FFF_CUDA_KERNEL(name) &::fff::cuda::name
#else
#define FFF_CUDA_KERNEL(name) nullptr
#endif

namespace fff {

// Runs one entry of the kernel tables for `t`'s device, on the current stream if that is a GPU.
template <typename Params>
void launch(const char* op, const at::Tensor& t, const Params& params,
            void (*cpu::Kernels::*cpu_kernel)(const Params&),
#ifdef FFF_WITH_CUDA
            const cuda::Kernel<Params>* cuda_kernel
#else
            std::nullptr_t /* no CUDA kernel in this build */
#endif
) {
  if (t.is_cpu()) {
    (cpu::kernels().*cpu_kernel)(params);
    return;
  }
#ifdef FFF_WITH_CUDA
  if (t.is_cuda()) {
    const c10::cuda::CUDAGuard guard(t.device());
    // The caching allocator gives it to nobody else before this stream is through with it.
    const at::Tensor workspace =
        at::empty({cuda_kernel->workspace_bytes(params)}, t.options().dtype(at::kByte));
    cuda_kernel->run(params, workspace.data_ptr(), c10::cuda::getCurrentCUDAStream(t.get_device()));
    return;
  }
#endif
  TORCH_CHECK(false, op,
              ": tensors must be on a device that this build of torch_fff supports, got ",
              t.device(), "; for CUDA, install torch_fff with nvcc and a CUDA build of torch");
}

}  // namespace fff
