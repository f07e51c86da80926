#include "row_pairs.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>

namespace fff {
namespace {

constexpr int64_t kBlock = 1024;  // tokens

// Calls f(leaf) for every leaf that counts for one token, leaves numbered over all trees.
template <typename T, typename F>
void for_kept(const T* mixture, int64_t trees, int64_t leaves, T prune, const F& f) {
  for (int64_t begin = 0; begin < trees * leaves; begin += leaves) {
    const T* weights = mixture + begin;
    const auto visit = [&](T threshold) {
      bool any = false;
      for (int64_t i = 0; i < leaves; ++i) {
        if (!(weights[i] < threshold)) {
          f(begin + i);
          any = true;
        }
      }
      return any;
    };
    if (!visit(prune)) {
      visit(*std::max_element(weights, weights + leaves));
    }
  }
}

// The pairs of values [tokens, rows] for which choose(values of one token, f) calls f(row).
template <typename T, typename Choose>
RowPairs sorted_pairs(const T* values, int64_t tokens, int64_t rows, const Choose& choose) {
  const int64_t blocks = (tokens + kBlock - 1) / kBlock;
  // Pairs of each block and row; later where the next one goes.
  std::vector<int64_t> slots(blocks * rows);
  const auto for_all = [&](const auto& f) {
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin * kBlock; t < std::min(end * kBlock, tokens); ++t) {
        int64_t* of_block = slots.data() + t / kBlock * rows;
        choose(values + t * rows, [&](int64_t row) { f(t, of_block[row]); });
      }
    });
  };
  for_all([](int64_t, int64_t& count) { ++count; });

  RowPairs pairs;
  int64_t at = 0;
  for (size_t i = 0; i < slots.size(); ++i) {
    const int64_t end = at + slots[i];
    slots[i] = at;
    while (at < end) {
      const int64_t count = std::min(end - at, RowRun::kMostPairs);
      pairs.runs.push_back({static_cast<int64_t>(i) % rows, at, count});
      at += count;
    }
  }
  pairs.tokens.resize(at);
  for_all([&](int64_t token, int64_t& slot) { pairs.tokens[slot++] = token; });
  return pairs;
}

template <typename F>
RowPairs dispatch(const at::Tensor& values, const F& f) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, values.scalar_type(),
                                         "row_pairs",
                                         [&] { return f(values.const_data_ptr<scalar_t>()); });
}

}  // namespace

RowPairs kept_pairs(const at::Tensor& mixture, double prune) {
  const int64_t trees = mixture.size(1), leaves = mixture.size(2);
  return dispatch(mixture, [&]<typename T>(const T* values) {
    return sorted_pairs(values, mixture.size(0), trees * leaves,
                        [&](const T* of_token, const auto& f) {
                          for_kept(of_token, trees, leaves, static_cast<T>(prune), f);
                        });
  });
}

RowPairs nonzero_pairs(const at::Tensor& values) {
  const int64_t rows = values.size(1);
  return dispatch(values, [&]<typename T>(const T* all) {
    return sorted_pairs(all, values.size(0), rows, [&](const T* of_token, const auto& f) {
      for (int64_t row = 0; row < rows; ++row) {
        if (of_token[row] != T(0)) {
          f(row);
        }
      }
    });
  });
}

}  // namespace fff
