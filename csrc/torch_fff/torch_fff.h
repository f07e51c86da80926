// torch_fff for C++ programs: fast feedforward trees as functions of tensors and as modules.
// Link torch_fff::torch_fff (CMake) and the operators torch.ops.fff are registered as well.
#pragma once

#include <torch_fff/functional.h>
#include <torch_fff/modules.h>
