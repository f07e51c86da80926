// The CUDA kernels, one entry for each of the CPU's table.
#pragma once

#include <driver_types.h>

#include <cstdint>

#include "params.h"

namespace fff::cuda {

template <typename Params>
struct Kernel {
  // Bytes of memory of its own that a call needs.
  int64_t (*workspace_bytes)(const Params& p);
  // Queues its work on `stream` and returns. `workspace` is 256-byte aligned and stays the call's
  // until the work is done. Throws std::runtime_error when CUDA refuses.
  void (*run)(const Params& p, void* workspace, cudaStream_t stream);
};

extern const Kernel<TreeForward> tree_forward;
extern const Kernel<TreeBackward> tree_backward;
extern const Kernel<LeafMixture> leaf_mixture;
extern const Kernel<LeafMixture> leaf_mixture_backward;
extern const Kernel<GatedActivation> gated_activation;
extern const Kernel<GatedActivation> gated_activation_backward;
extern const Kernel<PathGates> path_gates;
extern const Kernel<PathGates> path_gates_backward;

}  // namespace fff::cuda
