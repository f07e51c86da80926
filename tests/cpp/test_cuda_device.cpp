// The host's stand-in for a GPU: what its functions do, and that it finds what kernels forget.
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda_host.h"

namespace fff::cuda {
namespace {

constexpr int kThreadsOfTests = 64;

// A kernel of one function.
template <typename F>
struct Kernel {
  static constexpr int kThreads = kThreadsOfTests;
  static constexpr int kBlocksPerProcessor = 1;
  F body;
  void operator()(int64_t block) const {
    if constexpr (std::is_invocable_v<F, int64_t>) {
      body(block);
    } else {
      body();
    }
  }
};

template <typename F>
void launch(Order order, int64_t blocks, int64_t shared, const F& body, unsigned seed = 1) {
  HostQueue(order, seed).launch(Kernel<F>{body}, blocks, shared);
}

float* shared_floats() {
  return reinterpret_cast<float*>(shared_memory());
}

TEST(CudaDevice, EveryThreadOfEveryBlockRunsOnce) {
  for (const Order order : kOrders) {
    std::vector<int> runs(3 * kThreadsOfTests);
    launch(order, 3, 0, [&](int64_t block) { ++runs[block * kThreadsOfTests + thread_index()]; });
    EXPECT_EQ(runs, std::vector<int>(runs.size(), 1));
  }
}

TEST(CudaDevice, WarpFunctions) {
  for (const Order order : kOrders) {
    launch(order, 1, 0, [] {
      const int lane = lane_index();
      EXPECT_EQ(shuffle(10.0 * lane, (lane + 5) % 32), 10.0 * ((lane + 5) % 32));
      EXPECT_EQ(shuffle_xor(lane, 3), lane ^ 3);
      EXPECT_EQ(sum_over_warp(lane), 31 * 32 / 2);
      EXPECT_EQ(ballot(lane % 3 == 0), 0x49249249u);
    });
  }
}

// --- what is missing is found --------------------------------------------------------------------

// Each thread passes a value on to its neighbour, twice through the same memory.
template <bool kFirst, bool kSecond>
std::vector<float> neighbours(Order order) {
  std::vector<float> got(kThreadsOfTests);
  launch(order, 1, kThreadsOfTests * sizeof(float), [&] {
    const int i = thread_index(), next = (i + 1) % kThreadsOfTests;
    float value = static_cast<float>(i);
    for (int round = 0; round < 2; ++round) {
      shared_floats()[i] = value;
      if (kFirst) {
        sync_threads();
      }
      value = shared_floats()[next];
      if (kSecond) {
        sync_threads();
      }
    }
    got[i] = value;
  });
  return got;
}

TEST(CudaDevice, AMissingBarrierIsFound) {
  std::vector<float> want(kThreadsOfTests);
  for (int i = 0; i < kThreadsOfTests; ++i) {
    want[i] = static_cast<float>((i + 2) % kThreadsOfTests);
  }
  for (const Order order : kOrders) {
    EXPECT_EQ((neighbours<true, true>(order)), want);
    EXPECT_NE((neighbours<false, true>(order)), want) << "no barrier between write and read";
    EXPECT_NE((neighbours<true, false>(order)), want) << "no barrier between read and write";
  }
}

template <bool kSync>
int stale_values(Order order) {
  int stale = 0;
  launch(order, 1, kThreadsOfTests * sizeof(float), [&] {
    shared_floats()[thread_index()] = 1;
    if (kSync) {
      sync_warp();
    }
    stale += shared_floats()[thread_index() ^ 1] != 1;
  });
  return stale;
}

TEST(CudaDevice, AMissingWarpBarrierIsFound) {
  for (const Order order : kOrders) {
    EXPECT_EQ(stale_values<true>(order), 0);
    EXPECT_GT(stale_values<false>(order), 0);
  }
}

// Two groups of copies under way; the first is read.
template <int kPending, bool kSync>
int wrong_copies(Order order) {
  constexpr int64_t kBytes = kThreadsOfTests * 16;
  HostQueue memory(order);
  float* from = memory.array<float>(2 * kBytes / 4);
  std::iota(from, from + 2 * kBytes / 4, 0.0f);
  int wrong = 0;
  launch(order, 1, 2 * kBytes, [&] {
    for (int group = 0; group < 2; ++group) {
      const int64_t offset = group * kBytes / 4 + thread_index() * 4;
      copy_async(shared_floats() + offset, from + offset, 16);
      commit_copies();
    }
    wait_for_copies<kPending>();
    if (kSync) {
      sync_threads();
    }
    const int i = (thread_index() + 1) % kThreadsOfTests * 4 + 3;
    wrong += shared_floats()[i] != static_cast<float>(i);
    sync_threads();
  });
  return wrong;
}

TEST(CudaDevice, AMissingWaitForACopyIsFound) {
  for (const Order order : kOrders) {
    EXPECT_EQ((wrong_copies<1, true>(order)), 0);
    EXPECT_EQ((wrong_copies<2, true>(order)), kThreadsOfTests);
    EXPECT_GT((wrong_copies<1, false>(order)), 0);
  }
}

TEST(CudaDevice, CopiesFillUpWithZeros) {
  alignas(16) const float from[4] = {1, 2, 3, 4};
  launch(Order::kForward, 1, kThreadsOfTests * 16, [&] {
    float* to = shared_floats() + 4 * thread_index();
    const int count = thread_index() % 5;
    copy_async(to, count ? from : nullptr, count * 4);
    commit_copies();
    wait_for_copies<0>();
    for (int i = 0; i < 4; ++i) {
      EXPECT_EQ(to[i], i < count ? from[i] : 0);
    }
  });
}

template <typename F>
std::string error_of(const F& body) {
  try {
    launch(Order::kForward, 1, 0, body);
  } catch (const std::logic_error& error) {
    return error.what();
  }
  return "";
}

TEST(CudaDevice, ThreadsThatDoNotMeetAreFound) {
  EXPECT_NE(error_of([] {
              if (thread_index() != 7) {
                sync_threads();
              }
            }).find("wait for others that do not come"),
            std::string::npos);
  EXPECT_NE(error_of([] {
              if (lane_index() < 16) {
                sync_warp();
              } else {
                ballot(true);
              }
            }).find("sync_warp and ballot"),
            std::string::npos);
  EXPECT_NE(error_of([] { copy_async(shared_memory() + 4, nullptr, 0); }).find("multiple of 16"),
            std::string::npos);
}

#if defined(__SANITIZE_ADDRESS__)
TEST(CudaDeviceDeathTest, MemoryOutOfBoundsIsFound) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_DEATH(
      launch(Order::kForward, 1, 60 * sizeof(float), [] { shared_floats()[thread_index()] = 0; }),
      "heap-buffer-overflow");
  HostQueue memory(Order::kForward);
  const float* from = memory.array<float>(15);
  EXPECT_DEATH(launch(Order::kForward, 1, 16 * kThreadsOfTests,
                      [&] {
                        copy_async(shared_floats() + 4 * thread_index(),
                                   from + 4 * (thread_index() % 4), 16);
                        commit_copies();
                        wait_for_copies<0>();
                      }),
               "heap-buffer-overflow");
}
#endif

// --- matrix units --------------------------------------------------------------------------------

template <typename T>
class CudaMatrix : public testing::Test {};
using MatrixTypes = testing::Types<float, c10::BFloat16, c10::Half>;
TYPED_TEST_SUITE(CudaMatrix, MatrixTypes);

// D = A B through shared memory, B as rows of columns of A and, for 16-bit types, as rows of D too.
// The fragments are also checked against the layouts that the PTX manual draws.
TYPED_TEST(CudaMatrix, Product) {
  using T = TypeParam;
  constexpr int k = 32 / sizeof(T);
  const auto a_at = [](int row, int i) { return static_cast<float>((row * 7 + i * 3) % 9 - 4); };
  const auto b_at = [](int i, int column) {
    return static_cast<float>((column * 5 + i * 2) % 11 - 5);
  };
  launch(Order::kRandom, 1, 2 * (16 + 16) * 32 + 2 * 16 * 16, [&] {
    unsigned char* memory = shared_memory() + warp_index() * ((16 + 16) * 32 + 16 * 16);
    T* a = reinterpret_cast<T*>(memory);                 // [16, k]
    T* b = reinterpret_cast<T*>(memory + 16 * 32);       // [8, k], then again
    T* b_rows = reinterpret_cast<T*>(memory + 32 * 32);  // [k, 8]
    const int lane = lane_index(), g = lane / 4, t = lane % 4;
    for (int i = lane; i < 16 * k; i += 32) {
      a[i] = static_cast<T>(a_at(i / k, i % k));
      b[i] = static_cast<T>(b_at(i % k, i / k % 8));
      if (sizeof(T) == 2 && i < 8 * k) {
        b_rows[i] = static_cast<T>(b_at(i / 8, i % 8));
      }
    }
    sync_warp();
    uint32_t fa[4], fb[4];
    load_matrices(fa, memory + lane % 16 * 32 + lane / 16 * 16);
    load_matrices(fb, memory + 16 * 32 + (lane % 8 + lane / 16 * 8) * 32 + lane / 8 % 2 * 16);
    for (int i = 0; i < 4; ++i) {
      T own[4 / sizeof(T)];
      std::memcpy(own, &fa[i], 4);
      EXPECT_EQ(static_cast<float>(own[0]),
                a_at(g + i % 2 * 8, static_cast<int>((t + i / 2 * 4) * 4 / sizeof(T))));
    }
    uint32_t first[2] = {fb[0], fb[1]};
    EXPECT_EQ(fb[2], fb[0]);
    EXPECT_EQ(fb[3], fb[1]);
    if (sizeof(T) == 2) {
      uint32_t transposed[4];
      load_matrices_transposed(transposed, memory + 32 * 32 + lane % 16 * 16);
      EXPECT_EQ(transposed[0], fb[0]);
      EXPECT_EQ(transposed[1], fb[1]);
    }
    float d[4] = {1, 1, 1, 1};
    multiply_add<T>(d, fa, first);
    for (int i = 0; i < 4; ++i) {
      const int row = g + i / 2 * 8, column = 2 * t + i % 2;
      float want = 1;
      for (int j = 0; j < k; ++j) {
        want += a_at(row, j) * b_at(j, column);
      }
      EXPECT_EQ(d[i], want);
    }
  });
}

TEST(CudaMatrix, RoundsToTf32) {
  const auto rounded = [](float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    bits = round_to_tf32(bits);
    std::memcpy(&value, &bits, 4);
    return value;
  };
  EXPECT_EQ(rounded(1 + std::ldexp(1.0f, -10)), 1 + std::ldexp(1.0f, -10));
  EXPECT_EQ(rounded(1 + std::ldexp(1.0f, -11)), 1 + std::ldexp(1.0f, -10));
  EXPECT_EQ(rounded(1 + std::ldexp(1.0f, -12)), 1.0f);
  EXPECT_TRUE(std::isnan(rounded(NAN)));
}

}  // namespace
}  // namespace fff::cuda
