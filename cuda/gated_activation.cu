#include "gated_activation.cuh"

#include "queue.cuh"

namespace fff::cuda {

const Kernel<GatedActivation> gated_activation =
    kernel<GatedActivation>([](const auto& p, auto& queue) {
      dispatch(p.dtype, [&](auto zero) { pipeline::gated_activation<decltype(zero)>(p, queue); });
    });

const Kernel<GatedActivation> gated_activation_backward =
    kernel<GatedActivation>([](const auto& p, auto& queue) {
      dispatch(p.dtype,
               [&](auto zero) { pipeline::gated_activation_backward<decltype(zero)>(p, queue); });
    });

}  // namespace fff::cuda
