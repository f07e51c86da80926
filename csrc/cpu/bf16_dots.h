// Scalar products of bfloat16 vectors by the processor's own instruction (Intel from Cooper Lake
// on, AMD from Zen 4 on): two products a lane, summed in float32, and no conversions.
#pragma once

#include <c10/util/BFloat16.h>

#if defined(CPU_CAPABILITY_AVX512)
#include <immintrin.h>

#include <cstdint>

namespace fff::cpu {
inline namespace CPU_CAPABILITY {

inline bool has_bf16_dots() {
  return __builtin_cpu_supports("avx512bf16");
}

#define FFF_BF16_DOTS __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

// Elements [i, i + count) of p, zeros behind them.
FFF_BF16_DOTS inline __m512bh load_bf16(const c10::BFloat16* p, int64_t count) {
  const auto lanes = static_cast<__mmask32>((uint64_t(1) << count) - 1);
  return (__m512bh)_mm512_maskz_loadu_epi16(lanes, p);
}

FFF_BF16_DOTS inline __m512bh load_bf16(const c10::BFloat16* p) {
  return (__m512bh)_mm512_loadu_si512(p);
}

// dots_tile of vec.h for bfloat16.
template <int R, int N, int Stride>
FFF_BF16_DOTS void bf16_dots_tile(const c10::BFloat16* const* rows, const c10::BFloat16* const* xs,
                                  int64_t width, float (*out)[Stride]) {
  constexpr int64_t lanes = 32;
  // Independent sums hide the latency of the products when the tile is small.
  constexpr int unroll = R * N >= 8 ? 1 : R * N >= 4 ? 2 : R * N >= 2 ? 4 : 8;
  __m512 sums[unroll][R][N];
#pragma GCC unroll 32
  for (int u = 0; u < unroll; ++u) {
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 32
      for (int n = 0; n < N; ++n) {
        sums[u][r][n] = _mm512_setzero_ps();
      }
    }
  }
  int64_t i = 0;
  for (; i + unroll * lanes <= width; i += unroll * lanes) {
#pragma GCC unroll 32
    for (int u = 0; u < unroll; ++u) {
      __m512bh w[R];
#pragma GCC unroll 32
      for (int r = 0; r < R; ++r) {
        w[r] = load_bf16(rows[r] + i + u * lanes);
      }
#pragma GCC unroll 32
      for (int n = 0; n < N; ++n) {
        const __m512bh x = load_bf16(xs[n] + i + u * lanes);
#pragma GCC unroll 32
        for (int r = 0; r < R; ++r) {
          sums[u][r][n] = _mm512_dpbf16_ps(sums[u][r][n], w[r], x);
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
        sums[0][r][n] = _mm512_add_ps(sums[0][r][n], sums[u][r][n]);
      }
    }
  }
  for (; i < width; i += lanes) {
    const int64_t count = width - i < lanes ? width - i : lanes;
    __m512bh w[R];
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      w[r] = load_bf16(rows[r] + i, count);
    }
#pragma GCC unroll 32
    for (int n = 0; n < N; ++n) {
      const __m512bh x = load_bf16(xs[n] + i, count);
#pragma GCC unroll 32
      for (int r = 0; r < R; ++r) {
        sums[0][r][n] = _mm512_dpbf16_ps(sums[0][r][n], w[r], x);
      }
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 32
    for (int n = 0; n < N; ++n) {
      out[r][n] = _mm512_reduce_add_ps(sums[0][r][n]);
    }
  }
}

#undef FFF_BF16_DOTS

}  // namespace CPU_CAPABILITY
}  // namespace fff::cpu
#endif
