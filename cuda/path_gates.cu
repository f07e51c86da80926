#include "path_gates.cuh"

#include "queue.cuh"

namespace fff::cuda {
namespace {

// Not of float64: it walks.
template <typename F>
void dispatch_floats(DType dtype, const F& f) {
  dispatch(dtype, [&](auto zero) {
    if constexpr (!std::is_same_v<decltype(zero), double>) {
      f(zero);
    }
  });
}

}  // namespace

const Kernel<PathGates> path_gates = kernel<PathGates>([](const auto& p, auto& queue) {
  dispatch_floats(p.tree.forward.dtype,
                  [&](auto zero) { pipeline::path_gates<decltype(zero)>(p, queue); });
});

const Kernel<PathGates> path_gates_backward = kernel<PathGates>([](const auto& p, auto& queue) {
  dispatch_floats(p.tree.forward.dtype,
                  [&](auto zero) { pipeline::path_gates_backward<decltype(zero)>(p, queue); });
});

}  // namespace fff::cuda
