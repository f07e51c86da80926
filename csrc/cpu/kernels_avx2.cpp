// The kernels compiled with the flags of one instruction set.
#include "kernels_impl.h"

namespace fff::cpu {

Kernels avx2_table() {
  return table();
}

}  // namespace fff::cpu
