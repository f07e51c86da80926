// The hardware as kernels see it. They reach it through these functions alone, so that tests/cpp
// can run the very same kernels on a host, the threads of a block one at a time in orders of its
// choice.
//
// A kernel is a struct, copied to the device, with
//   kThreads              threads of a block, a multiple of 32
//   kBlocksPerProcessor   blocks that must fit on a multiprocessor at once, which bounds registers
//   operator()(int64_t block) const    what every thread of a block does
// and is launched by a queue (queue.cuh). Warp functions are called by all 32 lanes together.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "params.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FFF_DEVICE __device__
#define FFF_UNROLL _Pragma("unroll")  // so that arrays of the loop become registers
#define FFF_PRAGMA(text) _Pragma(#text)
#define FFF_UNROLL_BY(count) FFF_PRAGMA(unroll count)  // so that as many loads are under way
#else
#define FFF_DEVICE
#define FFF_UNROLL
#define FFF_UNROLL_BY(count)
#endif

namespace fff::cuda {

// --- types ---------------------------------------------------------------------------------------

// The type of scores and sums.
template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
inline constexpr DType kDType = DType::kFloat;
template <>
inline constexpr DType kDType<double> = DType::kDouble;
#if defined(__CUDACC__)
template <>
inline constexpr DType kDType<__nv_bfloat16> = DType::kBFloat16;
template <>
inline constexpr DType kDType<__half> = DType::kHalf;
#endif

// What moves in one instruction; aligned wherever it lies.
struct alignas(16) Chunk {
  uint32_t words[4];
};

inline constexpr int kWarpSize = 32;

#if defined(__CUDACC__)

// --- threads -------------------------------------------------------------------------------------

__device__ inline int thread_index() {
  return static_cast<int>(threadIdx.x);
}

// --- barriers ------------------------------------------------------------------------------------

// What the threads of the block, or the lanes of the warp, wrote before it, all of them see after.
__device__ inline void sync_threads() {
  __syncthreads();
}
__device__ inline void sync_warp() {
  __syncwarp();
}

// --- warps ---------------------------------------------------------------------------------------

// The value of lane `source`. V has 4 or 8 bytes.
template <typename V>
__device__ V shuffle(V value, int source) {
  return __shfl_sync(0xffffffffu, value, source);
}

// The value of lane `lane ^ mask`.
template <typename V>
__device__ V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Bit i: the predicate of lane i.
__device__ inline uint32_t ballot(bool predicate) {
  return __ballot_sync(0xffffffffu, predicate);
}

__device__ inline int count_bits(uint32_t bits) {
  return __popc(bits);
}
// Of bits that are not 0.
__device__ inline int highest_bit(uint32_t bits) {
  return 31 - __clz(static_cast<int>(bits));
}

// --- memory --------------------------------------------------------------------------------------

// The block's shared memory, of as many bytes as the launch says; 128-byte aligned.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

// 16 bytes at an address that is a multiple of 16.
__device__ inline Chunk load_chunk(const void* from) {
  const uint4 v = *static_cast<const uint4*>(from);
  return {{v.x, v.y, v.z, v.w}};
}
__device__ inline void store_chunk(void* to, const Chunk& chunk) {
  *static_cast<uint4*>(to) =
      make_uint4(chunk.words[0], chunk.words[1], chunk.words[2], chunk.words[3]);
}

__device__ inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Begins to copy `bytes` (at most 16) from global to shared memory, both 16-byte aligned; the rest
// of 16 bytes becomes 0. `from` is not read for 0 bytes. The thread that copied sees the result
// once it has waited, others after a barrier behind that.
__device__ inline void copy_async(void* shared, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(from), "r"(bytes)
               : "memory");
}
// Ends a group of the copies that this thread has begun.
__device__ inline void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most the latest `kPending` groups of this thread are under way.
template <int kPending>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// --- matrix units --------------------------------------------------------------------------------
// Lane 4 g + t holds of
//   A [16 x k]  rows g, g + 8, g, g + 8 of the first (twice) and the second half of k, there the
//   t-th
//               32 bits: elements 2t and 2t + 1 of 16-bit types, element t of tf32
//   B [k x 8]   column g, the first and the second half of k, there the t-th 32 bits
//   D [16 x 8]  rows g, g, g + 8, g + 8, columns 2t, 2t + 1, 2t, 2t + 1
// where k is what 32 bytes hold.

// Four 8 x 16-byte matrices; lane 8 i + j gives the 16-byte aligned shared address of row j of
// matrix i. Lane 4 g + t gets the t-th 32 bits of row g of each.
__device__ inline void load_matrices(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same of matrices of 16-bit elements, each transposed.
__device__ inline void load_matrices_transposed(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}

// The nearest tf32, as float's bits.
__device__ inline uint32_t round_to_tf32(uint32_t bits) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits)));
  return rounded;
}

// D += A B, with elements of T; float means tf32.
template <typename T>
__device__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(!std::is_same_v<T, double>);
  if constexpr (kDType<T> == DType::kBFloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else if constexpr (kDType<T> == DType::kHalf) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

#else  // on a host: defined in tests/cpp/cuda_host.cpp

int thread_index();
void sync_threads();
void sync_warp();
uint64_t shuffle_bits(uint64_t value, int source);
uint32_t ballot(bool predicate);
unsigned char* shared_memory();
Chunk load_chunk(const void* from);
void store_chunk(void* to, const Chunk& chunk);
void copy_async(void* shared, const void* from, int bytes);
void commit_copies();
void wait_for_copies(int pending);
void load_matrices(uint32_t (&m)[4], const void* row);
void load_matrices_transposed(uint32_t (&m)[4], const void* row);
uint32_t round_to_tf32(uint32_t bits);
void multiply_add(DType type, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

inline int count_bits(uint32_t bits) {
  return __builtin_popcount(bits);
}
inline int highest_bit(uint32_t bits) {
  return 31 - __builtin_clz(bits);
}
template <typename V>
V shuffle(V value, int source) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(V));
  bits = shuffle_bits(bits, source);
  std::memcpy(&value, &bits, sizeof(V));
  return value;
}
template <typename V>
V shuffle_xor(V value, int mask) {
  return shuffle(value, (thread_index() % kWarpSize) ^ mask);
}
template <int kPending>
void wait_for_copies() {
  wait_for_copies(kPending);
}
template <typename T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply_add(kDType<T>, d, a, b);
}

#endif

// --- made of these -------------------------------------------------------------------------------

FFF_DEVICE inline int lane_index() {
  return thread_index() % kWarpSize;
}
FFF_DEVICE inline int warp_index() {
  return thread_index() / kWarpSize;
}

// The sum over the warp, to the last bit the same in all lanes, for routes depend on it.
template <typename V>
FFF_DEVICE V sum_over_warp(V value) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += shuffle_xor(value, distance);
  }
  return value;
}

}  // namespace fff::cuda
