#include "gated_activation.cuh"

#include "kernels.h"
#include "launch.cuh"

namespace fff::cuda {

void gated_activation(const GatedActivation& p, cudaStream_t stream) {
  dispatch(p.dtype, [&](auto zero) { launch(GateToken<decltype(zero)>{p}, p.tokens, stream); });
}

void gated_activation_backward(const GatedActivation& p, cudaStream_t stream) {
  dispatch(p.dtype, [&](auto zero) {
    launch(GateBackwardLeaf<decltype(zero)>{p}, p.tokens * p.leaves, stream);
  });
}

}  // namespace fff::cuda
