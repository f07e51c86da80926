// Vectors of the accumulation type, and the three loops that all tree kernels are made of:
//   dots     scalar products of rows and tokens: scores, pre-activations, their gradients
//   combine  vectors as sums of coefficients times rows: outputs, gradients of inputs
//   outer    rows += sums of coefficients times vectors: gradients of weights
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../params.h"
#include "bf16_dots.h"

namespace fff::cpu {
inline namespace CPU_CAPABILITY {

template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename A>
using Vec = at::vec::Vectorized<A>;

template <typename T>
inline constexpr int64_t kLanes = Vec<acc_t<T>>::size();

// Tokens that share one pass over a row: as many as there are registers to hold their sums.
#if defined(CPU_CAPABILITY_AVX512)
inline constexpr int kTokenTile = 8;
inline constexpr int kVectorTile = 8;
#else
inline constexpr int kTokenTile = 4;
inline constexpr int kVectorTile = 4;
#endif

template <typename T>
inline Vec<acc_t<T>> load_vec(const T* p) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    return Vec<T>::loadu(p);
  } else {
    Vec<float> v;
    at::vec::load_to_float<T>(p, v);
    return v;
  }
}

// The first `count` < kLanes elements, zeros behind them.
template <typename T>
inline Vec<acc_t<T>> load_vec(const T* p, int64_t count) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    return Vec<T>::loadu(p, count);
  } else {
    alignas(64) T padded[kLanes<T>] = {};
    std::copy_n(p, count, padded);
    return load_vec(padded);
  }
}

template <typename T>
inline void store_vec(T* p, const Vec<acc_t<T>>& v, int64_t count) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    v.store(p, static_cast<int>(count));
  } else {
    alignas(64) float wide[kLanes<T>];
    v.store(wide);
    for (int64_t i = 0; i < count; ++i) {
      p[i] = static_cast<T>(wide[i]);
    }
  }
}

template <typename T>
inline void store_vec(T* p, const Vec<acc_t<T>>& v) {
  if constexpr (std::is_same_v<T, acc_t<T>>) {
    v.store(p);
  } else {
    at::vec::convert_from_float<T>(v, v).store(p, static_cast<int>(kLanes<T>));
  }
}

// A store that leaves the cache alone, for results larger than it. p is aligned to the vector; see
// can_stream.
template <typename T>
inline void stream_vec(T* p, const Vec<acc_t<T>>& v) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) {
    return _mm512_stream_ps(p, v);
  } else if constexpr (std::is_same_v<T, double>) {
    return _mm512_stream_pd(p, v);
  }
#elif defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, float>) {
    return _mm256_stream_ps(p, v);
  } else if constexpr (std::is_same_v<T, double>) {
    return _mm256_stream_pd(p, v);
  }
#endif
  store_vec(p, v);
}

// Orders streamed stores before whatever the thread does next.
inline void stream_fence() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

// Whether rows [count, width] at p are worth and fit for streamed stores.
template <typename T>
inline bool can_stream(const T* p, int64_t count, int64_t width) {
  constexpr int64_t bytes_worth = 8 << 20;
  constexpr int64_t line = 64;
  const auto row = static_cast<int64_t>(width * sizeof(T));
  return count * row >= bytes_worth && row % line == 0 &&
         reinterpret_cast<uintptr_t>(p) % line == 0;
}

// Keeps v in a register. Compilers like to repeat a load in every multiply-add that uses it, which
// is free while it hits the first-level cache, and slow where it misses.
#if defined(CPU_CAPABILITY_AVX512)
inline __m512 raw(const Vec<float>& v) {
  return v;
}
inline __m512d raw(const Vec<double>& v) {
  return v;
}
#define FFF_REGISTER "+v"
#elif defined(CPU_CAPABILITY_AVX2)
inline __m256 raw(const Vec<float>& v) {
  return v;
}
inline __m256d raw(const Vec<double>& v) {
  return v;
}
#define FFF_REGISTER "+x"
#endif

template <typename A>
inline void hold([[maybe_unused]] Vec<A>& v) {
#if defined(FFF_REGISTER)
  auto held = raw(v);
  asm("" : FFF_REGISTER(held));
  v = held;
#endif
}
#undef FFF_REGISTER

template <typename A>
inline A sum(const Vec<A>& v) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<A, float>) {
    return _mm512_reduce_add_ps(v);
  } else {
    return _mm512_reduce_add_pd(v);
  }
#else
  return at::vec::vec_reduce_all<A>([](const Vec<A>& a, const Vec<A>& b) { return a + b; }, v);
#endif
}

// out[r][n] = <rows[r], xs[n]> for R rows and N vectors.
template <int R, int N, typename T, int Stride>
inline void dots_tile(const T* const* rows, const T* const* xs, int64_t width,
                      acc_t<T> (*out)[Stride]) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    if (has_bf16_dots()) {
      return bf16_dots_tile<R, N>(rows, xs, width, out);
    }
  }
#endif
  using V = Vec<acc_t<T>>;
  constexpr int64_t lanes = kLanes<T>;
  // Independent sums hide the latency of the multiply-adds when the tile is small.
  constexpr int unroll = R * N >= 8 ? 1 : R * N >= 4 ? 2 : R * N >= 2 ? 4 : 8;
  V sums[unroll][R][N];
#pragma GCC unroll 32
  for (int u = 0; u < unroll; ++u) {
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 32
      for (int n = 0; n < N; ++n) {
        sums[u][r][n] = V(acc_t<T>(0));
      }
    }
  }
  int64_t i = 0;
  for (; i + unroll * lanes <= width; i += unroll * lanes) {
#pragma GCC unroll 32
    for (int u = 0; u < unroll; ++u) {
      V w[R];
#pragma GCC unroll 32
      for (int r = 0; r < R; ++r) {
        w[r] = load_vec(rows[r] + i + u * lanes);
      }
#pragma GCC unroll 32
      for (int n = 0; n < N; ++n) {
        V x = load_vec(xs[n] + i + u * lanes);
        hold(x);
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) {
          sums[u][r][n] = at::vec::fmadd(w[r], x, sums[u][r][n]);
        }
      }
    }
  }
#pragma GCC unroll 32
  for (int u = 1; u < unroll; ++u) {
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 32
      for (int n = 0; n < N; ++n) {
        sums[0][r][n] = sums[0][r][n] + sums[u][r][n];
      }
    }
  }
  for (; i < width; i += lanes) {
    const int64_t count = std::min(lanes, width - i);
    const bool whole = count == lanes;
    V w[R];
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      w[r] = whole ? load_vec(rows[r] + i) : load_vec(rows[r] + i, count);
    }
#pragma GCC unroll 32
    for (int n = 0; n < N; ++n) {
      const V x = whole ? load_vec(xs[n] + i) : load_vec(xs[n] + i, count);
#pragma GCC unroll 32
      for (int r = 0; r < R; ++r) {
        sums[0][r][n] = at::vec::fmadd(w[r], x, sums[0][r][n]);
      }
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 32
    for (int n = 0; n < N; ++n) {
      out[r][n] = sum(sums[0][r][n]);
    }
  }
}

// As dots_tile, for a number of vectors known only at run time, 1 <= n <= kTokenTile.
template <int R, typename T>
inline void dots(const T* const* rows, const T* const* xs, int n, int64_t width,
                 acc_t<T> (*out)[kTokenTile]) {
  switch (n) {
    case 1:
      return dots_tile<R, 1>(rows, xs, width, out);
    case 2:
      return dots_tile<R, 2>(rows, xs, width, out);
    case 3:
      return dots_tile<R, 3>(rows, xs, width, out);
    case 4:
      return dots_tile<R, 4>(rows, xs, width, out);
#if defined(CPU_CAPABILITY_AVX512)
    case 5:
      return dots_tile<R, 5>(rows, xs, width, out);
    case 6:
      return dots_tile<R, 6>(rows, xs, width, out);
    case 7:
      return dots_tile<R, 7>(rows, xs, width, out);
    case 8:
      return dots_tile<R, 8>(rows, xs, width, out);
#endif
  }
}

// out[r][n] = <rows[r], xs[n]> for `count` rows and n <= kTokenTile vectors.
template <typename T>
inline void dots_rows(const T* const* rows, int64_t count, const T* const* xs, int n, int64_t width,
                      acc_t<T> (*out)[kTokenTile]) {
  int64_t r = 0;
  for (; r + 3 <= count; r += 3) {
    dots<3>(rows + r, xs, n, width, out + r);
  }
  for (; r < count; ++r) {
    dots<1>(rows + r, xs, n, width, out + r);
  }
}

// What combine does with y: overwrite it, overwrite it past the cache, or add to it.
enum class Write { kStore, kStream, kAdd };

// How the trees, one after the other, write their sum [tokens, width] to y.
template <typename O>
inline Write write_mode(const O* y, const TreeShape& s, int64_t width, int64_t tree) {
  if (s.trees > 1) {
    return tree > 0 ? Write::kAdd : Write::kStore;
  }
  return can_stream(y, s.tokens, width) ? Write::kStream : Write::kStore;
}

// ys[n] (+)= sum_r coefficients[n * stride + r] * rows[r] for N vectors that share their rows. The
// order of each sum does not depend on N.
template <int N, typename T, typename O>
inline void combine_tile(const T* const* rows, const acc_t<T>* coefficients, int64_t stride,
                         int64_t count, O* const* ys, int64_t width, Write write) {
  using V = Vec<acc_t<T>>;
  constexpr int64_t lanes = kLanes<T>;
  // As many columns as there are registers for their sums, the row and a coefficient.
  constexpr int registers = kTokenTile == 8 ? 32 : 16;
  constexpr int tile = std::min(kVectorTile, (registers - 2) / (N + 1));
  int64_t i = 0;
  for (; i + tile * lanes <= width; i += tile * lanes) {
    V sums[N][tile];
#pragma GCC unroll 32
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 32
      for (int j = 0; j < tile; ++j) {
        sums[n][j] = write == Write::kAdd ? load_vec(ys[n] + i + j * lanes) : V(acc_t<T>(0));
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      V row[tile];
#pragma GCC unroll 32
      for (int j = 0; j < tile; ++j) {
        row[j] = load_vec(rows[r] + i + j * lanes);
      }
#pragma GCC unroll 32
      for (int n = 0; n < N; ++n) {
        const V c(coefficients[n * stride + r]);
#pragma GCC unroll 32
        for (int j = 0; j < tile; ++j) {
          sums[n][j] = at::vec::fmadd(c, row[j], sums[n][j]);
        }
      }
    }
#pragma GCC unroll 32
    for (int n = 0; n < N; ++n) {
#pragma GCC unroll 32
      for (int j = 0; j < tile; ++j) {
        if (write == Write::kStream) {
          stream_vec(ys[n] + i + j * lanes, sums[n][j]);
        } else {
          store_vec(ys[n] + i + j * lanes, sums[n][j]);
        }
      }
    }
  }
  for (; i < width; i += lanes) {
    const int64_t lane_count = std::min(lanes, width - i);
    for (int n = 0; n < N; ++n) {
      V sums = write == Write::kAdd ? load_vec(ys[n] + i, lane_count) : V(acc_t<T>(0));
      for (int64_t r = 0; r < count; ++r) {
        const V c(coefficients[n * stride + r]);
        sums = at::vec::fmadd(c, load_vec(rows[r] + i, lane_count), sums);
      }
      store_vec(ys[n] + i, sums, lane_count);
    }
  }
}

// As combine_tile, for any number of vectors.
template <typename T, typename O>
inline void combine(const T* const* rows, const acc_t<T>* coefficients, int64_t stride,
                    int64_t count, O* const* ys, int n, int64_t width, Write write) {
  const auto step = [&]<int N>(std::integral_constant<int, N>) {
    for (; n >= N; n -= N, ys += N, coefficients += N * stride) {
      combine_tile<N>(rows, coefficients, stride, count, ys, width, write);
    }
  };
  if constexpr (kTokenTile == 8) {
    step(std::integral_constant<int, 8>());
  }
  step(std::integral_constant<int, 4>());
  step(std::integral_constant<int, 2>());
  step(std::integral_constant<int, 1>());
}

// And for a single one.
template <typename T, typename O>
inline void combine(const T* const* rows, const acc_t<T>* coefficients, int64_t count, O* y,
                    int64_t width, Write write) {
  combine_tile<1>(rows, coefficients, count, count, &y, width, write);
}

// rows[r][begin, end) += sum_t coefficients[t * stride + r] * xs[t][begin, end)
template <int R, typename T>
inline void outer_tile(acc_t<T>* const* rows, const acc_t<T>* coefficients, int64_t stride,
                       const T* const* xs, int64_t count, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using V = Vec<A>;
  constexpr int64_t lanes = kLanes<T>;
  constexpr int tile = 2;
  int64_t i = begin;
  for (; i + tile * lanes <= end; i += tile * lanes) {
    V sums[R][tile];
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 32
      for (int j = 0; j < tile; ++j) {
        sums[r][j] = V::loadu(rows[r] + i + j * lanes);
      }
    }
    for (int64_t t = 0; t < count; ++t) {
      V x[tile];
#pragma GCC unroll 32
      for (int j = 0; j < tile; ++j) {
        x[j] = load_vec(xs[t] + i + j * lanes);
      }
#pragma GCC unroll 32
      for (int r = 0; r < R; ++r) {
        const V c(coefficients[t * stride + r]);
#pragma GCC unroll 32
        for (int j = 0; j < tile; ++j) {
          sums[r][j] = at::vec::fmadd(c, x[j], sums[r][j]);
        }
      }
    }
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 32
      for (int j = 0; j < tile; ++j) {
        sums[r][j].store(rows[r] + i + j * lanes);
      }
    }
  }
  for (; i < end; i += lanes) {
    const int64_t lane_count = std::min(lanes, end - i);
    for (int r = 0; r < R; ++r) {
      V sums = load_vec(rows[r] + i, lane_count);
      for (int64_t t = 0; t < count; ++t) {
        sums =
            at::vec::fmadd(V(coefficients[t * stride + r]), load_vec(xs[t] + i, lane_count), sums);
      }
      store_vec(rows[r] + i, sums, lane_count);
    }
  }
}

template <typename T>
inline void outer(acc_t<T>* const* rows, const acc_t<T>* coefficients, int64_t row_count,
                  int64_t stride, const T* const* xs, int64_t count, int64_t begin, int64_t end) {
  constexpr int tile = kTokenTile == 8 ? 12 : 6;
  int64_t r = 0;
  for (; r + tile <= row_count; r += tile) {
    outer_tile<tile>(rows + r, coefficients + r, stride, xs, count, begin, end);
  }
  for (; r + 4 <= row_count; r += 4) {
    outer_tile<4>(rows + r, coefficients + r, stride, xs, count, begin, end);
  }
  for (; r < row_count; ++r) {
    outer_tile<1>(rows + r, coefficients + r, stride, xs, count, begin, end);
  }
}

// Calls f with a value of the type that dtype names.
template <typename F>
inline void dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat:
      return f(float());
    case DType::kDouble:
      return f(double());
    case DType::kBFloat16:
      return f(c10::BFloat16());
    case DType::kHalf:
      return f(c10::Half());
  }
}

}  // namespace CPU_CAPABILITY
}  // namespace fff::cpu
