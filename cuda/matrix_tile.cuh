// Products of a block's tile on the matrix units: 128 rows, which 8 warps share as 4 x 2, each with
// 32 rows and half of the columns.
//
// Rows in shared memory are 16 bytes longer than their contents, so that the 8 rows that an
// instruction reads lie in different banks.
#pragma once

#include "rows.cuh"

namespace fff::cuda {

inline constexpr int kTileRows = 128;
inline constexpr int kTileThreads = 256;
inline constexpr int kRowPad = 16;  // bytes

// The 16 bytes of rows of `width` elements that begin at element `column`.
template <typename T>
struct RowChunk {
  int64_t column;
  int inside;    // elements that are inside of a row
  bool aligned;  // as rows are

  FFF_DEVICE RowChunk(int64_t first, int64_t width, bool rows_aligned)
      : column(first), inside(kPerChunk<T>), aligned(rows_aligned) {
    if (width - column < kPerChunk<T>) {
      inside = column < width ? static_cast<int>(width - column) : 0;
    }
  }

  // Copies them to shared memory; what is outside, and a row that is null, reads as 0. Seen after a
  // wait for copies and a barrier.
  FFF_DEVICE void stage(unsigned char* shared, const T* row) const {
    const int count = row ? inside : 0;
    if (aligned) {
      copy_async(shared, count > 0 ? row + column : row, count * static_cast<int>(sizeof(T)));
      return;
    }
    T* to = reinterpret_cast<T*>(shared);
    for (int i = 0; i < kPerChunk<T>; ++i) {
      to[i] = i < count ? row[column + i] : static_cast<T>(0.0f);
    }
  }
};

// Rows of one operand, which a thread helps to stage: 8 threads copy 128 bytes of a row at a time.
template <typename T, int kRows>
class StagedRows {
 public:
  static constexpr int kBytes = 128;
  static constexpr int kPitch = kBytes + kRowPad;
  static constexpr int kColumns = kBytes / static_cast<int>(sizeof(T));

  // row_at(i): row i, or null.
  template <typename RowAt>
  FFF_DEVICE StagedRows(const RowAt& row_at, const void* array, int64_t width)
      : width_(width), aligned_(is_aligned(array, width * static_cast<int64_t>(sizeof(T)))) {
    FFF_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      rows_[i] = row_at(thread_index() / 8 + i * kStride);
    }
  }

  FFF_DEVICE void stage(unsigned char* shared, int64_t column) const {
    const int own = thread_index() % 8;
    const RowChunk<T> chunk(column + own * kPerChunk<T>, width_, aligned_);
    FFF_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      chunk.stage(shared + (thread_index() / 8 + i * kStride) * kPitch + own * 16, rows_[i]);
    }
  }

 private:
  static constexpr int kStride = kTileThreads / 8;
  static constexpr int kOwn = kRows / kStride;
  static_assert(kRows % kStride == 0);

  const T* rows_[kOwn];
  int64_t width_;
  bool aligned_;
};

// One warp's part of a tile of kColumns columns and 32 rows for every two warps. Floats are rounded
// to tf32 or, `whole`, cut into two of them, of whose products all count but that of the small
// parts: what is lost is rounding.
template <typename T, int kColumns>
class WarpTile {
 public:
  static constexpr int kWarpColumns = kColumns / 2;
  static_assert(kWarpColumns % 16 == 0);

  FFF_DEVICE explicit WarpTile(bool whole = false) : whole_(whole) {}

  // += 32 bytes of each row of A times 32 bytes of each row of B, whose rows are columns here.
  FFF_DEVICE void add_rows(const unsigned char* a, int a_pitch, const unsigned char* b,
                           int b_pitch) {
    const int lane = lane_index();
    Fragment fa[2];
    load_a(fa, a, a_pitch);
    FFF_UNROLL
    for (int j = 0; j < kWarpColumns / 16; ++j) {
      Fragment fb;
      load_matrices(fb.bits, b + (column() + j * 16 + lane % 8 + lane / 16 * 8) * b_pitch +
                                 lane / 8 % 2 * 16);
      cut(fb);
      multiply(fa, fb, j);
    }
  }

  // += 32 bytes of each row of A times as many rows of B.
  FFF_DEVICE void add_columns(const unsigned char* a, int a_pitch, const unsigned char* b,
                              int b_pitch) {
    Fragment fa[2];
    load_a(fa, a, a_pitch);
    FFF_UNROLL
    for (int j = 0; j < kWarpColumns / 16; ++j) {
      Fragment fb;
      load_columns(fb, b, b_pitch, j);
      multiply(fa, fb, j);
    }
  }

  // += of 32 bytes' worth of rows, A's transposed times B's.
  FFF_DEVICE void add_outer(const unsigned char* a, int a_pitch, const unsigned char* b,
                            int b_pitch) {
    const int lane = lane_index();
    Fragment fa[2];
    FFF_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int first = row() + i * 16;
      if constexpr (sizeof(T) == 2) {
        load_matrices_transposed(
            fa[i].bits, a + (lane % 8 + lane / 16 * 8) * a_pitch + (first + lane / 8 % 2 * 8) * 2);
      } else {
        const unsigned char* from = a + lane % 4 * a_pitch + (first + lane / 4) * 4;
        FFF_UNROLL
        for (int j = 0; j < 4; ++j) {
          fa[i].bits[j] =
              *reinterpret_cast<const uint32_t*>(from + j / 2 * 4 * a_pitch + j % 2 * 8 * 4);
        }
      }
      cut(fa[i]);
    }
    FFF_UNROLL
    for (int j = 0; j < kWarpColumns / 16; ++j) {
      Fragment fb;
      load_columns(fb, b, b_pitch, j);
      multiply(fa, fb, j);
    }
  }

  // The warp's first row and column.
  FFF_DEVICE static int row() { return warp_index() / 2 * 32; }
  FFF_DEVICE static int column() { return warp_index() % 2 * kWarpColumns; }

  // To [rows, pitch] floats in shared memory.
  FFF_DEVICE void store(float* to, int pitch) const {
    FFF_UNROLL
    for (int half = 0; half < 2; ++half) {
      store_half(half, to + (row() + half * 16) * pitch + column(), pitch);
    }
  }

  // The warp's first or second 16 rows, to [16, pitch].
  FFF_DEVICE void store_half(int half, float* to, int pitch) const {
    const int lane = lane_index();
    FFF_UNROLL
    for (int j = 0; j < kWarpColumns / 8; ++j) {
      FFF_UNROLL
      for (int e = 0; e < 4; ++e) {
        to[(lane / 4 + e / 2 * 8) * pitch + j * 8 + lane % 4 * 2 + e % 2] = sums_[half][j][e];
      }
    }
  }

 private:
  struct Fragment {
    uint32_t bits[4];
    uint32_t rest[4];  // of floats that are cut
  };

  FFF_DEVICE void cut(Fragment& fragment) const {
    if constexpr (std::is_same_v<T, float>) {
      FFF_UNROLL
      for (int i = 0; i < 4; ++i) {
        const uint32_t bits = fragment.bits[i];
        fragment.bits[i] = round_to_tf32(bits);
        if (whole_) {
          fragment.rest[i] = round_to_tf32(difference(bits, fragment.bits[i]));
        }
      }
    }
  }

  // Of floats. What is infinite leaves nothing.
  FFF_DEVICE static uint32_t difference(uint32_t a, uint32_t b) {
    float values[2];
    std::memcpy(&values[0], &a, sizeof(float));
    std::memcpy(&values[1], &b, sizeof(float));
    const float rest = values[0] == values[1] ? 0.0f : values[0] - values[1];
    std::memcpy(&a, &rest, sizeof(float));
    return a;
  }

  FFF_DEVICE void load_a(Fragment (&fa)[2], const unsigned char* a, int pitch) const {
    const int lane = lane_index();
    FFF_UNROLL
    for (int i = 0; i < 2; ++i) {
      load_matrices(fa[i].bits, a + (row() + i * 16 + lane % 16) * pitch + lane / 16 * 16);
      cut(fa[i]);
    }
  }

  // Columns 16 j ... 16 j + 15 of rows of B.
  FFF_DEVICE void load_columns(Fragment& fb, const unsigned char* b, int pitch, int j) const {
    const int lane = lane_index();
    const int first = column() + j * 16;
    if constexpr (sizeof(T) == 2) {
      load_matrices_transposed(fb.bits, b + lane % 16 * pitch + (first + lane / 16 * 8) * 2);
    } else {
      const unsigned char* from = b + lane % 4 * pitch + (first + lane / 4) * 4;
      FFF_UNROLL
      for (int i = 0; i < 4; ++i) {
        fb.bits[i] = *reinterpret_cast<const uint32_t*>(from + i % 2 * 4 * pitch + i / 2 * 8 * 4);
      }
    }
    cut(fb);
  }

  // Columns 16 j ... 16 j + 15.
  FFF_DEVICE void multiply(const Fragment (&fa)[2], const Fragment& fb, int j) {
    FFF_UNROLL
    for (int i = 0; i < 2; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        if (whole_) {
          multiply(i, j, fa[i].rest, fb.bits);
          multiply(i, j, fa[i].bits, fb.rest);
        }
      }
      multiply(i, j, fa[i].bits, fb.bits);
    }
  }
  FFF_DEVICE void multiply(int i, int j, const uint32_t (&a)[4], const uint32_t (&b)[4]) {
    const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
    multiply_add<T>(sums_[i][2 * j], a, first);
    multiply_add<T>(sums_[i][2 * j + 1], a, second);
  }

  bool whole_;
  float sums_[2][kWarpColumns / 8][4] = {};
};

// All dot products of 128 rows with kColumns rows.
template <typename T, int kColumns>
class DotTile {
  using A = StagedRows<T, kTileRows>;
  using B = StagedRows<T, kColumns>;
  static constexpr int kStages = 3;
  static constexpr int kStageBytes = (kTileRows + kColumns) * A::kPitch;

 public:
  // Floats of a row of results: odd, for the banks when every thread reads from a row of its own,
  // and not 1 more than their number, for those when they are stored.
  static constexpr int kPitch = kColumns + 5;
  static constexpr int64_t kSharedBytes = kStages * kStageBytes;
  static_assert(kTileRows * kPitch * sizeof(float) <= kSharedBytes);

  // In registers; `shared`, which has kSharedBytes, is free again.
  FFF_DEVICE static WarpTile<T, kColumns> sums(unsigned char* shared, const A& a, const B& b,
                                               int64_t width, bool whole) {
    const int64_t steps = (width + A::kColumns - 1) / A::kColumns;
    const auto stage = [&](int64_t step) {
      if (step < steps) {
        unsigned char* to = shared + step % kStages * kStageBytes;
        a.stage(to, step * A::kColumns);
        b.stage(to + kTileRows * A::kPitch, step * A::kColumns);
      }
      commit_copies();
    };
    for (int step = 0; step < kStages - 1; ++step) {
      stage(step);
    }
    WarpTile<T, kColumns> sums(whole);
    for (int64_t step = 0; step < steps; ++step) {
      wait_for_copies<kStages - 2>();
      sync_threads();  // the stage is here, and the one before it is free
      stage(step + kStages - 1);
      const unsigned char* from = shared + step % kStages * kStageBytes;
      FFF_UNROLL
      for (int k = 0; k < A::kBytes; k += 32) {
        sums.add_rows(from + k, A::kPitch, from + kTileRows * A::kPitch + k, B::kPitch);
      }
    }
    wait_for_copies<0>();
    sync_threads();
    return sums;
  }

  // Leaves the results [128, kPitch] in `shared`, behind a barrier.
  FFF_DEVICE static float* run(unsigned char* shared, const A& a, const B& b, int64_t width,
                               bool whole = false) {
    float* results = reinterpret_cast<float*>(shared);
    sums(shared, a, b, width, whole).store(results, kPitch);
    sync_threads();
    return results;
  }
};

}  // namespace fff::cuda
