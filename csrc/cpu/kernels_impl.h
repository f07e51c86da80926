// Everything that is compiled once per instruction set.
#pragma once

#include "gated_activation_impl.h"
#include "kernels.h"
#include "leaf_mixture_impl.h"
#include "path_gates_impl.h"
#include "sparse_leaves_impl.h"
#include "sparse_linear_impl.h"
#include "tree_backward_impl.h"
#include "tree_forward_impl.h"

namespace fff::cpu {
inline namespace CPU_CAPABILITY {

inline Kernels table() {
  return {tree_forward,
          tree_backward,
          leaf_mixture,
          leaf_mixture_backward,
          gated_activation,
          gated_activation_backward,
          path_gates,
          path_gates_backward,
          sparse_leaves,
          sparse_leaves_backward,
          sparse_linear_backward};
}

}  // namespace CPU_CAPABILITY
}  // namespace fff::cpu
