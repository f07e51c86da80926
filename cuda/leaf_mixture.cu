#include "leaf_mixture.cuh"

#include "queue.cuh"

namespace fff::cuda {

const Kernel<LeafMixture> leaf_mixture = kernel<LeafMixture>([](const auto& p, auto& queue) {
  dispatch(p.dtype, [&](auto zero) { pipeline::leaf_mixture<decltype(zero)>(p, queue); });
});

const Kernel<LeafMixture> leaf_mixture_backward = kernel<LeafMixture>([](const auto& p,
                                                                         auto& queue) {
  dispatch(p.dtype, [&](auto zero) { pipeline::leaf_mixture_backward<decltype(zero)>(p, queue); });
});

}  // namespace fff::cuda
