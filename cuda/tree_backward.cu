#include "tree_backward.cuh"

#include "kernels.h"
#include "launch.cuh"

namespace fff::cuda {

void tree_backward(const TreeBackward& p, cudaStream_t stream) {
  dispatch(p.forward.dtype, [&](auto zero) {
    using T = decltype(zero);
    using Gates = GateGradients<acc_t<T>>;
    const Workspace<acc_t<T>> workspace(Gates::size(p), stream);
    const Gates gates(p, workspace.data());
    launch(BackwardToken<T>{p, gates}, p.forward.shape.tokens, stream);
    for (const BackwardRow<T>& rows : backward_rows<T>(p, gates)) {
      launch(rows, rows.items(Warp::size), stream);
    }
  });
}

}  // namespace fff::cuda
