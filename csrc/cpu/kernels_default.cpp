// The kernels compiled with the flags of one instruction set.
#include "kernels_impl.h"

namespace fff::cpu {

Kernels default_table() {
  return table();
}

}  // namespace fff::cpu
