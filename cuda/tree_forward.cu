#include "tree_forward.cuh"

#include "kernels.h"
#include "launch.cuh"

namespace fff::cuda {

void tree_forward(const TreeForward& p, cudaStream_t stream) {
  dispatch(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Workspace<acc_t<T>> gates(ForwardToken<T>::gates_size(p), stream);
    launch(ForwardToken<T>{p, gates.data()}, p.shape.tokens, stream);
  });
}

}  // namespace fff::cuda
