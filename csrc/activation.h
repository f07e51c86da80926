// The activations that the kernels know, and their scalar definitions; cpu/vec_activation.h has the
// same on vectors.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define FFF_HOST_DEVICE __host__ __device__
#else
#define FFF_HOST_DEVICE
#endif

namespace fff {

enum class Activation : int { kIdentity, kRelu, kGelu, kGeluTanh, kSilu };

namespace detail {
inline constexpr double kInvSqrt2 = 0.70710678118654752440;
inline constexpr double kInvSqrt2Pi = 0.39894228040143267794;
inline constexpr double kSqrt2OverPi = 0.79788456080286535588;
inline constexpr double kTanhCubic = 0.044715;
}  // namespace detail

template <typename A>
FFF_HOST_DEVICE inline A sigmoid(A z) {
  return A(1) / (A(1) + std::exp(-z));
}

// activation(s). A is float or double; NaN stays NaN.
template <typename A>
FFF_HOST_DEVICE inline A activate(Activation kind, A s) {
  switch (kind) {
    case Activation::kRelu:
      return s < A(0) ? A(0) : s;
    case Activation::kGelu:
      return A(0.5) * s * (A(1) + std::erf(s * A(detail::kInvSqrt2)));
    case Activation::kGeluTanh: {
      const A inner = A(detail::kSqrt2OverPi) * (s + A(detail::kTanhCubic) * s * s * s);
      return A(0.5) * s * (A(1) + std::tanh(inner));
    }
    case Activation::kSilu:
      return s * sigmoid(s);
    case Activation::kIdentity:
      break;
  }
  return s;
}

// d activation(s) / ds, as torch has it: 0 at ReLU's corner, 1 at a NaN.
template <typename A>
FFF_HOST_DEVICE inline A activation_slope(Activation kind, A s) {
  switch (kind) {
    case Activation::kRelu:
      return s <= A(0) ? A(0) : A(1);
    case Activation::kGelu: {
      const A cdf = A(0.5) * (A(1) + std::erf(s * A(detail::kInvSqrt2)));
      return cdf + s * A(detail::kInvSqrt2Pi) * std::exp(A(-0.5) * s * s);
    }
    case Activation::kGeluTanh: {
      const A inner = A(detail::kSqrt2OverPi) * (s + A(detail::kTanhCubic) * s * s * s);
      const A t = std::tanh(inner);
      const A inner_slope = A(detail::kSqrt2OverPi) * (A(1) + A(3 * detail::kTanhCubic) * s * s);
      return A(0.5) * (A(1) + t) + A(0.5) * s * (A(1) - t * t) * inner_slope;
    }
    case Activation::kSilu: {
      const A c = sigmoid(s);
      return c * (A(1) + s * (A(1) - c));
    }
    case Activation::kIdentity:
      break;
  }
  return A(1);
}

}  // namespace fff
