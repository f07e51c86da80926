// The loops of csrc/cpu/vec.h, as the default instruction set compiles them, for every remainder of
// their blocks; the other sets' loops are covered through their kernel tables.
#define CPU_CAPABILITY DEFAULT
#define CPU_CAPABILITY_DEFAULT

#include "cpu/vec.h"

#include <gtest/gtest.h>

#include <limits>
#include <random>
#include <vector>

namespace fff::cpu {
namespace {

template <typename T>
class VecTest : public testing::Test {};

using Types = testing::Types<float, double, c10::BFloat16, c10::Half>;
TYPED_TEST_SUITE(VecTest, Types);

constexpr int64_t kWidths = 140;  // more than two of the largest block
constexpr int64_t kMargin = 64;   // elements behind a row that nobody may touch

// Rows of multiples of 1/8 in [-1, 1], whose sums of products are exact, with NaN behind them.
template <typename T>
struct Rows {
  Rows(int64_t count, int64_t width) : stride(width + kMargin), values(count * stride) {
    static std::mt19937 random(1);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < stride; ++j) {
        const float number = static_cast<float>(random() % 17) / 8 - 1;
        values[i * stride + j] = static_cast<T>(j < width ? number : NAN);
      }
      rows.push_back(values.data() + i * stride);
    }
  }
  Rows(const Rows&) = delete;

  double operator()(int64_t i, int64_t j) const { return static_cast<double>(rows[i][j]); }
  // Whether only the first `width` elements of row i were ever written.
  bool margin_untouched(int64_t i) const {
    return std::all_of(rows[i] + stride - kMargin, rows[i] + stride,
                       [](T v) { return std::isnan(static_cast<double>(v)); });
  }

  int64_t stride;
  std::vector<T> values;
  std::vector<T*> rows;
};

// Four rows: a tile of three and one of one.
TYPED_TEST(VecTest, DotsOfEveryWidthAndTile) {
  using T = TypeParam;
  for (int64_t width = 0; width <= kWidths; ++width) {
    const Rows<T> rows(4, width), xs(kTokenTile, width);
    for (int n = 1; n <= kTokenTile; ++n) {
      acc_t<T> out[4][kTokenTile];
      dots_rows(rows.rows.data(), 4, xs.rows.data(), n, width, out);
      for (int64_t r = 0; r < 4; ++r) {
        for (int t = 0; t < n; ++t) {
          double want = 0;
          for (int64_t i = 0; i < width; ++i) {
            want += rows(r, i) * xs(t, i);
          }
          ASSERT_EQ(out[r][t], want) << "width " << width << ", row " << r << ", vector " << t;
        }
      }
    }
  }
}

template <typename T, typename O>
void combine_every_width(int n, Write write) {
  for (int64_t width = 0; width <= kWidths; ++width) {
    for (const int64_t count : {0, 1, 5}) {
      const Rows<T> rows(count, width);
      const Rows<acc_t<T>> c(n, count);
      Rows<O> y(n, width);
      std::vector<double> want(n * width);
      for (int64_t at = 0; at < n * width; ++at) {
        want[at] = write == Write::kAdd ? y(at / width, at % width) : 0;
        for (int64_t r = 0; r < count; ++r) {
          want[at] += c(at / width, r) * rows(r, at % width);
        }
      }
      combine(rows.rows.data(), c.rows[0], c.stride, count, y.rows.data(), n, width, write);
      for (int64_t at = 0; at < n * width; ++at) {
        const O rounded = static_cast<O>(static_cast<acc_t<T>>(want[at]));
        ASSERT_EQ(y(at / width, at % width), static_cast<double>(rounded))
            << "width " << width << ", vector " << at / width << ", column " << at % width;
      }
      for (int t = 0; t < n; ++t) {
        ASSERT_TRUE(y.margin_untouched(t)) << "width " << width;
      }
    }
  }
}

TYPED_TEST(VecTest, CombineOfEveryWidth) {
  for (const int n : {1, 3, kTokenTile}) {
    for (const Write write : {Write::kStore, Write::kAdd}) {
      combine_every_width<TypeParam, TypeParam>(n, write);
      combine_every_width<TypeParam, acc_t<TypeParam>>(n, write);
    }
  }
}

// Column ranges that begin and end anywhere, and as many rows as take every tile: 6, 4 and 1.
TYPED_TEST(VecTest, OuterOfEveryRangeAndTile) {
  using T = TypeParam;
  constexpr int64_t kCount = 3;
  for (const int64_t row_count : {1, 4, 6, 11, 23}) {
    for (const int64_t begin : {0, 5, 64}) {
      for (int64_t end = begin; end <= begin + 40; ++end) {
        const Rows<T> xs(kCount, end);
        const Rows<acc_t<T>> c(kCount, row_count);
        Rows<acc_t<T>> rows(row_count, end);
        const std::vector<acc_t<T>> before = rows.values;
        outer(rows.rows.data(), c.rows[0], row_count, c.stride, xs.rows.data(), kCount, begin, end);
        for (int64_t r = 0; r < row_count; ++r) {
          for (int64_t i = 0; i < end; ++i) {
            double want = before[r * rows.stride + i];
            for (int64_t t = 0; i >= begin && t < kCount; ++t) {
              want += c(t, r) * xs(t, i);
            }
            ASSERT_EQ(rows(r, i), want) << row_count << " rows, columns " << begin << " to " << end
                                        << ", row " << r << ", column " << i;
          }
          ASSERT_TRUE(rows.margin_untouched(r));
        }
      }
    }
  }
}

}  // namespace
}  // namespace fff::cpu
