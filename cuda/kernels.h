// The CUDA kernels, one function for each entry of the CPU's table: each queues its work on
// `stream` and returns. They throw std::runtime_error when CUDA refuses.
#pragma once

#include <driver_types.h>

#include "params.h"

namespace fff::cuda {

void tree_forward(const TreeForward& p, cudaStream_t stream);
void tree_backward(const TreeBackward& p, cudaStream_t stream);
void leaf_mixture(const LeafMixture& p, cudaStream_t stream);
void leaf_mixture_backward(const LeafMixture& p, cudaStream_t stream);
void gated_activation(const GatedActivation& p, cudaStream_t stream);
void gated_activation_backward(const GatedActivation& p, cudaStream_t stream);

}  // namespace fff::cuda
