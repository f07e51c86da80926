// The CPU kernels as a table of functions on raw pointers, one table per instruction set.
#pragma once

#include "../params.h"

namespace fff::cpu {

struct Kernels {
  void (*tree_forward)(const TreeForward&);
  void (*tree_backward)(const TreeBackward&);
  void (*leaf_mixture)(const LeafMixture&);
  void (*leaf_mixture_backward)(const LeafMixture&);
  void (*gated_activation)(const GatedActivation&);
  void (*gated_activation_backward)(const GatedActivation&);
  void (*path_gates)(const PathGates&);
  void (*path_gates_backward)(const PathGates&);
  void (*sparse_leaves)(const SparseLeaves&);
  void (*sparse_leaves_backward)(const SparseLeaves&);
  void (*sparse_linear_backward)(const SparseLinearBackward&);
};

// The table for this process: the best the machine has, or what ATEN_CPU_CAPABILITY asks for.
const Kernels& kernels();

// The tables, each from a file that is compiled for its instruction set.
Kernels default_table();
#if defined(__x86_64__)
Kernels avx2_table();
Kernels avx512_table();
#endif

}  // namespace fff::cpu
