#include "leaf_mixture.cuh"

#include "kernels.h"
#include "launch.cuh"

namespace fff::cuda {

void leaf_mixture(const LeafMixture& p, cudaStream_t stream) {
  dispatch(p.dtype, [&](auto zero) { launch(MixtureToken<decltype(zero)>{p}, p.tokens, stream); });
}

void leaf_mixture_backward(const LeafMixture& p, cudaStream_t stream) {
  const int64_t nodes = (int64_t(1) << p.depth) - 1;
  dispatch(p.dtype, [&](auto zero) {
    launch(MixtureBackwardNode<decltype(zero)>{p}, p.tokens * nodes, stream);
  });
}

}  // namespace fff::cuda
