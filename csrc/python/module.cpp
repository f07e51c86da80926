// torch_fff._C tells how the op library beside it was built, and nothing else. The values come from
// CMakeLists.txt.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, module) {
  module.doc() = "How libtorch_fff.so was built.";
  module.attr("torch_version") = FFF_TORCH_VERSION;
  module.attr("compiler") = FFF_COMPILER;
  module.attr("cpu_capabilities") = pybind11::make_tuple(FFF_CPU_CAPABILITIES);
#ifdef FFF_CUDA_VERSION
  module.attr("cuda_version") = FFF_CUDA_VERSION;
#else
  module.attr("cuda_version") = pybind11::none();
#endif
}
