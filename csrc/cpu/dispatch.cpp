#include <ATen/Version.h>

#include <string>

#include "kernels.h"

namespace fff::cpu {

const Kernels& kernels() {
  static const Kernels chosen = [] {
#if defined(__x86_64__)
    const std::string capability = at::get_cpu_capability();
    if (capability.rfind("AVX512", 0) == 0) {
      return avx512_table();
    }
    if (capability == "AVX2") {
      return avx2_table();
    }
#endif
    return default_table();
  }();
  return chosen;
}

}  // namespace fff::cpu
