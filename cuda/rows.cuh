// Products with one row at a time, read in chunks where rows are aligned.
#pragma once

#include "device.cuh"

namespace fff::cuda {

template <typename T>
inline constexpr int kPerChunk = 16 / static_cast<int>(sizeof(T));

// Whether rows of `bytes` bytes from `p` on can be read in chunks.
FFF_DEVICE inline bool is_aligned(const void* p, int64_t bytes) {
  return (reinterpret_cast<uintptr_t>(p) | static_cast<uintptr_t>(bytes)) % sizeof(Chunk) == 0;
}

// The elements of a chunk.
template <typename T>
struct Elements {
  T values[kPerChunk<T>];

  // `count` elements, and zeros up to a chunk; `aligned` if the row is.
  FFF_DEVICE static Elements load(const T* from, int64_t count, bool aligned) {
    Elements e;
    if (aligned && count >= kPerChunk<T>) {
      const Chunk chunk = load_chunk(from);
      std::memcpy(&e, &chunk, sizeof(e));
    } else {
      FFF_UNROLL
      for (int i = 0; i < kPerChunk<T>; ++i) {
        e.values[i] = i < count ? from[i] : static_cast<T>(0.0f);
      }
    }
    return e;
  }

  FFF_DEVICE void store(T* to, int64_t count, bool aligned) const {
    if (aligned && count >= kPerChunk<T>) {
      Chunk chunk;
      std::memcpy(&chunk, this, sizeof(chunk));
      store_chunk(to, chunk);
    } else {
      FFF_UNROLL
      for (int i = 0; i < kPerChunk<T>; ++i) {
        if (i < count) {
          to[i] = values[i];
        }
      }
    }
  }
};

// From a 16-byte aligned address.
template <int kCount>
FFF_DEVICE void load_floats(float (&values)[kCount], const float* from) {
  FFF_UNROLL
  for (int first = 0; first < kCount; first += kPerChunk<float>) {
    const auto e = Elements<float>::load(from + first, kPerChunk<float>, true);
    FFF_UNROLL
    for (int i = 0; i < kPerChunk<float>; ++i) {
      values[first + i] = e.values[i];
    }
  }
}

// Stores `count` sums as O from `to` on; added to what is there if `adds`. `aligned` if the row is.
template <typename O, typename A, int kCount>
FFF_DEVICE void store_sums(O* to, const A (&sums)[kCount], int64_t count, bool aligned, bool adds) {
  static_assert(kCount % kPerChunk<O> == 0);
  FFF_UNROLL
  for (int first = 0; first < kCount; first += kPerChunk<O>) {
    Elements<O> e;
    if (adds) {
      e = Elements<O>::load(to + first, count - first, aligned);
    }
    FFF_UNROLL
    for (int i = 0; i < kPerChunk<O>; ++i) {
      const A old = adds ? static_cast<A>(e.values[i]) : A(0);
      e.values[i] = static_cast<O>(sums[first + i] + old);
    }
    e.store(to + first, count - first, aligned);
  }
}

// <a, b> of elements `begin` ... `end` - 1, by a warp, the same in all lanes. `begin` is a multiple
// of a chunk.
template <typename T>
FFF_DEVICE acc_t<T> dot_of_warp(const T* a, const T* b, int64_t begin, int64_t end, bool aligned) {
  constexpr int kInFlight = 4;  // chunks of each row
  constexpr int kStep = kWarpSize * kPerChunk<T>;
  using A = acc_t<T>;
  A sum = A(0);
  for (int64_t at = begin + lane_index() * kPerChunk<T>; at < end; at += kInFlight * kStep) {
    Elements<T> x[kInFlight], y[kInFlight];
    FFF_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      const int64_t from = at + i * kStep;
      x[i] = Elements<T>::load(a + from, end - from, aligned);
      y[i] = Elements<T>::load(b + from, end - from, aligned);
    }
    FFF_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      FFF_UNROLL
      for (int j = 0; j < kPerChunk<T>; ++j) {
        sum += static_cast<A>(x[i].values[j]) * static_cast<A>(y[i].values[j]);
      }
    }
  }
  return sum_over_warp(sum);
}

// <a, b>, read in chunks if both begin at multiples of 16 bytes.
template <typename T>
FFF_DEVICE acc_t<T> dot_of_rows(const T* a, const T* b, int64_t width) {
  return dot_of_warp(a, b, 0, width, is_aligned(a, 0) && is_aligned(b, 0));
}

}  // namespace fff::cuda
