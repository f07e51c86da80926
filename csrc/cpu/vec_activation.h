// activation.h's functions on vectors, with the kind chosen outside the loop.
#pragma once

#include "vec.h"

namespace fff::cpu {
inline namespace CPU_CAPABILITY {

template <typename A>
inline Vec<A> vec_sigmoid(const Vec<A>& z) {
  return Vec<A>(A(1)) / (Vec<A>(A(1)) + z.neg().exp());
}

// The value of the activation and its slope; whichever the caller drops costs nothing.
template <Activation kind, typename A>
struct VecActivation {
  static Vec<A> value(const Vec<A>& s) {
    using V = Vec<A>;
    if constexpr (kind == Activation::kRelu) {
      return at::vec::maximum(s, V(A(0)));
    } else if constexpr (kind == Activation::kGelu) {
      return V(A(0.5)) * s * (V(A(1)) + (s * V(A(detail::kInvSqrt2))).erf());
    } else if constexpr (kind == Activation::kGeluTanh) {
      const V inner = V(A(detail::kSqrt2OverPi)) * (s + V(A(detail::kTanhCubic)) * s * s * s);
      return V(A(0.5)) * s * (V(A(1)) + inner.tanh());
    } else if constexpr (kind == Activation::kSilu) {
      return s * vec_sigmoid<A>(s);
    } else {
      return s;
    }
  }

  static Vec<A> slope(const Vec<A>& s) {
    using V = Vec<A>;
    const V one(A(1));
    if constexpr (kind == Activation::kRelu) {
      return V::blendv(one, V(A(0)), s <= V(A(0)));
    } else if constexpr (kind == Activation::kGelu) {
      const V cdf = V(A(0.5)) * (one + (s * V(A(detail::kInvSqrt2))).erf());
      return cdf + s * V(A(detail::kInvSqrt2Pi)) * (V(A(-0.5)) * s * s).exp();
    } else if constexpr (kind == Activation::kGeluTanh) {
      const V inner = V(A(detail::kSqrt2OverPi)) * (s + V(A(detail::kTanhCubic)) * s * s * s);
      const V t = inner.tanh();
      const V inner_slope =
          V(A(detail::kSqrt2OverPi)) * (one + V(A(3 * detail::kTanhCubic)) * s * s);
      return V(A(0.5)) * (one + t) + V(A(0.5)) * s * (one - t * t) * inner_slope;
    } else if constexpr (kind == Activation::kSilu) {
      const V c = vec_sigmoid<A>(s);
      return c * (one + s * (one - c));
    } else {
      return one;
    }
  }
};

// Calls f with std::integral_constant<Activation, kind>.
template <typename F>
inline void dispatch_activation(Activation kind, const F& f) {
  switch (kind) {
    case Activation::kIdentity:
      return f(std::integral_constant<Activation, Activation::kIdentity>());
    case Activation::kRelu:
      return f(std::integral_constant<Activation, Activation::kRelu>());
    case Activation::kGelu:
      return f(std::integral_constant<Activation, Activation::kGelu>());
    case Activation::kGeluTanh:
      return f(std::integral_constant<Activation, Activation::kGeluTanh>());
    case Activation::kSilu:
      return f(std::integral_constant<Activation, Activation::kSilu>());
  }
}

// value[i] = activation(s[i]) and, where wanted, slope[i] = its derivative.
template <typename A>
inline void activate_all(Activation activation, const A* s, int64_t count, A* value,
                         A* slope = nullptr) {
  dispatch_activation(activation, [&](auto kind) {
    using Act = VecActivation<decltype(kind)::value, A>;
    constexpr int64_t lanes = kLanes<A>;
    for (int64_t i = 0; i < count; i += lanes) {
      const int64_t n = std::min(lanes, count - i);
      const Vec<A> v = load_vec(s + i, n);
      if (slope) {
        store_vec(slope + i, Act::slope(v), n);
      }
      store_vec(value + i, Act::value(v), n);
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace fff::cpu
