// Runs CUDA kernels on the host: every thread of a block is a fiber that runs until it has to wait
// for others, and then another goes on, in an order that is chosen to find what is missing:
//   - a barrier: some thread is far ahead of the others, or far behind, and memory that was not
//     written yet holds NaN;
//   - a wait for an asynchronous copy: copies happen no sooner than they are waited for;
//   - a place in memory: every array is a heap block of its exact size, for AddressSanitizer;
//   - a thread: where others wait for one that is elsewhere, or is through, launch() throws.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "../../cuda/device.cuh"

namespace fff::cuda {

template <>
inline constexpr DType kDType<c10::BFloat16> = DType::kBFloat16;
template <>
inline constexpr DType kDType<c10::Half> = DType::kHalf;

// Which thread goes on, of those that can, and which block comes next.
enum class Order { kForward, kReverse, kRandom };
inline constexpr Order kOrders[] = {Order::kForward, Order::kReverse, Order::kRandom};

class HostQueue {
 public:
  static constexpr int64_t kBusyBlocks = 4;  // so that small cases have blocks with much to do

  explicit HostQueue(Order order, unsigned seed = 1) : order_(order), random_(seed) {}

  template <typename V>
  V* array(int64_t count) {
    arrays_.push_back(undefined_memory(count * static_cast<int64_t>(sizeof(V))));
    return reinterpret_cast<V*>(arrays_.back().get());
  }

  template <typename F>
  void scope(const F& f) {
    const size_t before = arrays_.size();
    f();
    arrays_.resize(before);
  }

  template <typename Body>
  void launch(const Body& body, int64_t blocks, int64_t shared) {
    static_assert(Body::kThreads % kWarpSize == 0 && Body::kThreads <= 1024);
    run([&body](int64_t block) { body(block); }, Body::kThreads, blocks, shared);
  }

  void exclusive_sum(int32_t* values, int64_t count) {
    std::exclusive_scan(values, values + count, values, 0);
  }

 private:
  struct Free {
    void operator()(std::byte* memory) const;
  };
  using Memory = std::unique_ptr<std::byte, Free>;
  static Memory undefined_memory(int64_t bytes);  // 256-byte aligned; NaN as any type

  void run(const std::function<void(int64_t)>& kernel, int threads, int64_t blocks, int64_t shared);

  Order order_;
  std::mt19937 random_;
  std::vector<Memory> arrays_;
};

}  // namespace fff::cuda
