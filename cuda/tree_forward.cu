#include "tree_forward.cuh"

#include "queue.cuh"

namespace fff::cuda {

const Kernel<TreeForward> tree_forward = kernel<TreeForward>([](const auto& p, auto& queue) {
  dispatch(p.dtype, [&](auto zero) { pipeline::tree_forward<decltype(zero)>(p, queue); });
});

}  // namespace fff::cuda
