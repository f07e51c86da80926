#include "tree_backward.cuh"

#include "queue.cuh"

namespace fff::cuda {

const Kernel<TreeBackward> tree_backward = kernel<TreeBackward>([](const auto& p, auto& queue) {
  dispatch(p.forward.dtype, [&](auto zero) { pipeline::tree_backward<decltype(zero)>(p, queue); });
});

}  // namespace fff::cuda
