#include "cuda_host.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <deque>
#include <exception>
#include <new>
#include <span>
#include <stdexcept>
#include <string>

#include "fiber.h"

namespace fff::cuda {
namespace {

constexpr std::align_val_t kAlignment{256};
constexpr int kUndefined = 0xff;  // of every byte: NaN as any type
constexpr size_t kStackBytes = 64 * 1024;

[[noreturn]] void fail(const std::string& what) {
  throw std::logic_error("CUDA kernel on the host: " + what);
}

void require_aligned(const void* p, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % 16 != 0) {
    fail(std::string(what) + ": the address is no multiple of 16");
  }
}

struct Copy {
  std::byte* to;
  const std::byte* from;
  int bytes;
};

struct Thread {
  Thread() : fiber(kStackBytes) {}

  test::Fiber fiber;
  int index = 0;
  bool finished = false;
  const char* waits_in = nullptr;  // while it does
  void* argument = nullptr;        // of the warp function in which it waits
  std::vector<Copy> copies;        // begun since the last commit
  std::deque<std::vector<Copy>> groups;
};

// What a warp function was called with, by lane.
using Arguments = std::array<void*, kWarpSize>;

// Threads that wait for each other: a warp, or the block.
struct Gathering {
  const char* in = nullptr;
  int arrived = 0;
};

// The block that runs. Threads wait in a function that all of a warp, or of the block, must enter;
// the last one to come does the work for all and sets them free.
class Block {
 public:
  Block(std::span<std::unique_ptr<Thread>> threads, Order order, std::mt19937& random,
        const std::function<void()>& body)
      : threads_(threads),
        order_(order),
        random_(random),
        body_(body),
        warps_(threads.size() / kWarpSize),
        ready_(warps_.size(), ~uint32_t(0)) {}

  unsigned char* shared = nullptr;
  Thread* running = nullptr;

  void run() {
    for (size_t i = 0; i < threads_.size(); ++i) {
      Thread& t = *threads_[i];
      t.index = static_cast<int>(i);
      t.finished = false;
      t.copies.clear();
      t.groups.clear();
      t.fiber.restart([this, &t] {
        try {
          body_();
        } catch (...) {
          error_ = std::current_exception();
        }
        t.finished = true;
        set_ready(t.index, false);
        t.fiber.switch_to(scheduler_, true);
      });
    }
    for (int next = next_ready(); next >= 0; next = next_ready()) {
      running = threads_[next].get();
      scheduler_.switch_to(running->fiber);
      if (error_) {
        std::rethrow_exception(error_);
      }
    }
    if (!std::ranges::all_of(threads_, [](const auto& t) { return t->finished; })) {
      fail("threads wait for others that do not come: " + whereabouts());
    }
  }

  // Called by every lane of a warp with its own `argument`; the last one calls `complete` with all.
  template <typename Complete>
  void in_warp(const char* name, void* argument, const Complete& complete) {
    const int warp = running->index / kWarpSize;
    running->argument = argument;
    meet(name, warps_[warp], warp * kWarpSize, kWarpSize, [&] {
      Arguments arguments;
      for (int lane = 0; lane < kWarpSize; ++lane) {
        arguments[lane] = threads_[warp * kWarpSize + lane]->argument;
      }
      complete(arguments);
    });
  }

  void in_block(const char* name) {
    meet(name, whole_, 0, static_cast<int>(threads_.size()), [] {});
  }

 private:
  template <typename Complete>
  void meet(const char* name, Gathering& gathering, int first, int count,
            const Complete& complete) {
    Thread& self = *running;
    if (gathering.arrived > 0 && gathering.in != name) {
      fail(std::string("lanes of a warp are in ") + gathering.in + " and " + name);
    }
    self.waits_in = name;
    set_ready(self.index, false);
    gathering.in = name;
    if (++gathering.arrived == count) {
      complete();
      gathering.arrived = 0;
      for (int i = first; i < first + count; ++i) {
        set_ready(i, true);
      }
    }
    self.fiber.switch_to(scheduler_);
  }

  void set_ready(int thread, bool ready) {
    const uint32_t bit = uint32_t(1) << thread % kWarpSize;
    uint32_t& warp = ready_[thread / kWarpSize];
    warp = ready ? warp | bit : warp & ~bit;
  }

  // A thread that can go on; -1 if there is none.
  int next_ready() {
    const int count = static_cast<int>(ready_.size());
    const int start = order_ == Order::kRandom ? static_cast<int>(random_() % count) : 0;
    for (int i = 0; i < count; ++i) {
      const int warp = order_ == Order::kReverse ? count - 1 - i : (start + i) % count;
      if (const uint32_t bits = ready_[warp]) {
        return warp * kWarpSize + lane_of(bits);
      }
    }
    return -1;
  }

  int lane_of(uint32_t bits) {
    switch (order_) {
      case Order::kForward:
        return std::countr_zero(bits);
      case Order::kReverse:
        return highest_bit(bits);
      case Order::kRandom:
        break;
    }
    const int lane = static_cast<int>(random_() % kWarpSize);
    const uint32_t from_lane = bits >> lane << lane;
    return std::countr_zero(from_lane ? from_lane : bits);
  }

  std::string whereabouts() const {
    std::string text;
    const char* last = nullptr;
    for (const auto& t : threads_) {
      const char* in = t->finished ? "the end" : t->waits_in;
      if (in != last) {
        text += (last ? ", " : "") + std::to_string(t->index) + "... in " + in;
        last = in;
      }
    }
    return text;
  }

  const std::span<std::unique_ptr<Thread>> threads_;
  const Order order_;
  std::mt19937& random_;
  const std::function<void()>& body_;
  std::vector<Gathering> warps_;
  std::vector<uint32_t> ready_;  // of each warp the lanes that can go on
  Gathering whole_;
  test::Fiber scheduler_;
  std::exception_ptr error_;
};

Block* block = nullptr;

void perform(const std::vector<Copy>& copies) {
  for (const Copy& c : copies) {
    std::memset(c.to, 0, 16);
    std::copy_n(c.from, c.bytes, c.to);
  }
}

// --- numbers of the matrix units, read as the instructions do ------------------------------------

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Element i of 32 bytes in 8 words, where words 0...3 are the first half.
float element(DType type, const uint32_t* words, int i) {
  switch (type) {
    case DType::kFloat:
      return float_of(words[i] & 0xffffe000u);  // tf32: the bits below are not looked at
    case DType::kBFloat16:
      return float_of(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
    case DType::kHalf:
      return static_cast<float>(
          c10::Half(static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16)), c10::Half::from_bits()));
    case DType::kDouble:
      break;
  }
  fail("multiply_add: no such type");
}

struct MultiplyAdd {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

void multiply_add_warp(DType type, const Arguments& arguments) {
  const int k = type == DType::kFloat ? 8 : 16;
  const auto lane = [&](int i) { return static_cast<MultiplyAdd*>(arguments[i]); };
  float a[16][16], b[8][16];
  for (int row = 0; row < 16; ++row) {
    uint32_t words[8];
    for (int w = 0; w < 8; ++w) {
      words[w] = lane(row % 8 * 4 + w % 4)->a[row / 8 + w / 4 * 2];
    }
    for (int i = 0; i < k; ++i) {
      a[row][i] = element(type, words, i);
    }
  }
  for (int column = 0; column < 8; ++column) {
    uint32_t words[8];
    for (int w = 0; w < 8; ++w) {
      words[w] = lane(column * 4 + w % 4)->b[w / 4];
    }
    for (int i = 0; i < k; ++i) {
      b[column][i] = element(type, words, i);
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float& d = lane(row % 8 * 4 + column / 2)->d[row / 8 * 2 + column % 2];
      for (int i = 0; i < k; ++i) {
        d += a[row][i] * b[column][i];
      }
    }
  }
}

struct LoadMatrices {
  uint32_t* to;
  const unsigned char* row;
};

void load_matrices_warp(bool transposed, const Arguments& arguments) {
  const auto lane = [&](int i) { return static_cast<LoadMatrices*>(arguments[i]); };
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t elements[8][8];
    for (int row = 0; row < 8; ++row) {
      std::memcpy(elements[row], lane(8 * matrix + row)->row, 16);
    }
    for (int i = 0; i < kWarpSize; ++i) {
      const int row = i / 4, column = i % 4 * 2;
      const uint32_t low = transposed ? elements[column][row] : elements[row][column];
      const uint32_t high = transposed ? elements[column + 1][row] : elements[row][column + 1];
      lane(i)->to[matrix] = low | high << 16;
    }
  }
}

void load_matrices(const char* name, bool transposed, uint32_t (&m)[4], const void* row) {
  require_aligned(row, name);
  LoadMatrices argument{m, static_cast<const unsigned char*>(row)};
  block->in_warp(name, &argument,
                 [&](const Arguments& all) { load_matrices_warp(transposed, all); });
}

}  // namespace

// --- device.cuh ----------------------------------------------------------------------------------

int thread_index() {
  return block->running->index;
}

void sync_threads() {
  block->in_block("sync_threads");
}
void sync_warp() {
  block->in_warp("sync_warp", nullptr, [](const Arguments&) {});
}

uint64_t shuffle_bits(uint64_t value, int source) {
  struct Shuffle {
    uint64_t value;
    int source;
    uint64_t result;
  } argument{value, source, 0};
  block->in_warp("shuffle", &argument, [](const Arguments& all) {
    for (void* a : all) {
      Shuffle& own = *static_cast<Shuffle*>(a);
      own.result = static_cast<Shuffle*>(all.at(own.source))->value;
    }
  });
  return argument.result;
}

uint32_t ballot(bool predicate) {
  struct Ballot {
    bool predicate;
    uint32_t result;
  } argument{predicate, 0};
  block->in_warp("ballot", &argument, [](const Arguments& all) {
    uint32_t bits = 0;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      bits |= uint32_t(static_cast<Ballot*>(all[lane])->predicate) << lane;
    }
    for (void* a : all) {
      static_cast<Ballot*>(a)->result = bits;
    }
  });
  return argument.result;
}

unsigned char* shared_memory() {
  return block->shared;
}

Chunk load_chunk(const void* from) {
  require_aligned(from, "load_chunk");
  Chunk chunk;
  std::memcpy(&chunk, from, sizeof(chunk));
  return chunk;
}
void store_chunk(void* to, const Chunk& chunk) {
  require_aligned(to, "store_chunk");
  std::memcpy(to, &chunk, sizeof(chunk));
}

void copy_async(void* shared, const void* from, int bytes) {
  require_aligned(shared, "copy_async");
  if (bytes > 0) {
    require_aligned(from, "copy_async");
  }
  std::memset(shared, kUndefined, 16);
  block->running->copies.push_back(
      {static_cast<std::byte*>(shared), static_cast<const std::byte*>(from), bytes});
}
void commit_copies() {
  Thread& t = *block->running;
  t.groups.push_back(std::move(t.copies));
  t.copies.clear();
}
void wait_for_copies(int pending) {
  auto& groups = block->running->groups;
  for (; groups.size() > static_cast<size_t>(pending); groups.pop_front()) {
    perform(groups.front());
  }
}

void load_matrices(uint32_t (&m)[4], const void* row) {
  load_matrices("load_matrices", false, m, row);
}
void load_matrices_transposed(uint32_t (&m)[4], const void* row) {
  load_matrices("load_matrices_transposed", true, m, row);
}

// To nearest, ties away from zero; NaN and infinity stay.
uint32_t round_to_tf32(uint32_t bits) {
  return std::isfinite(float_of(bits)) ? (bits + 0x1000u) & 0xffffe000u : bits;
}

void multiply_add(DType type, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  MultiplyAdd argument{d, a, b};
  block->in_warp("multiply_add", &argument,
                 [&](const Arguments& all) { multiply_add_warp(type, all); });
}

// --- HostQueue -----------------------------------------------------------------------------------

void HostQueue::Free::operator()(std::byte* memory) const {
  ::operator delete(memory, kAlignment);
}

HostQueue::Memory HostQueue::undefined_memory(int64_t bytes) {
  Memory memory(static_cast<std::byte*>(::operator new(bytes, kAlignment)));
  std::memset(memory.get(), kUndefined, bytes);
  return memory;
}

void HostQueue::run(const std::function<void(int64_t)>& kernel, int threads, int64_t blocks,
                    int64_t shared) {
  constexpr int64_t kMostShared = 227 * 1024;
  if (shared > kMostShared) {
    fail(std::to_string(shared) + " bytes of shared memory are more than a block can have");
  }
  static std::vector<std::unique_ptr<Thread>> pool;
  while (pool.size() < static_cast<size_t>(threads)) {
    pool.push_back(std::make_unique<Thread>());
  }
  std::vector<int64_t> sequence(blocks);
  std::iota(sequence.begin(), sequence.end(), 0);
  if (order_ == Order::kReverse) {
    std::reverse(sequence.begin(), sequence.end());
  } else if (order_ == Order::kRandom) {
    std::shuffle(sequence.begin(), sequence.end(), random_);
  }
  const Memory memory = undefined_memory(shared);
  for (const int64_t index : sequence) {
    std::memset(memory.get(), kUndefined, shared);
    const std::function<void()> body = [&] { kernel(index); };
    Block current(std::span(pool.data(), threads), order_, random_, body);
    current.shared = reinterpret_cast<unsigned char*>(memory.get());
    block = &current;
    current.run();
  }
  block = nullptr;
}

}  // namespace fff::cuda
