#include "leaf_pairs.h"

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

}  // namespace

LeafPairs kept_pairs(const at::Tensor& mixture, double prune) {
  const int64_t tokens = mixture.size(0), trees = mixture.size(1), leaves = mixture.size(2);
  const int64_t all_leaves = trees * leaves;
  const int64_t blocks = (tokens + kBlock - 1) / kBlock;
  // Pairs of each block and leaf; later where the next one goes.
  std::vector<int64_t> slots(blocks * all_leaves);
  const auto for_all_kept = [&](const auto& f) {
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, mixture.scalar_type(), "kept_pairs", [&] {
          const auto* weights = mixture.const_data_ptr<scalar_t>();
          at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
            for (int64_t t = begin * kBlock; t < std::min(end * kBlock, tokens); ++t) {
              int64_t* of_block = slots.data() + t / kBlock * all_leaves;
              for_kept(weights + t * all_leaves, trees, leaves, static_cast<scalar_t>(prune),
                       [&](int64_t leaf) { f(t, of_block[leaf]); });
            }
          });
        });
  };
  for_all_kept([](int64_t, int64_t& count) { ++count; });

  LeafPairs pairs;
  int64_t at = 0;
  for (size_t i = 0; i < slots.size(); ++i) {
    const int64_t end = at + slots[i];
    slots[i] = at;
    while (at < end) {
      const int64_t count = std::min(end - at, LeafRun::kMostPairs);
      pairs.runs.push_back({static_cast<int64_t>(i) % all_leaves, at, count});
      at += count;
    }
  }
  pairs.tokens.resize(at);
  for_all_kept([&](int64_t token, int64_t& slot) { pairs.tokens[slot++] = token; });
  return pairs;
}

}  // namespace fff
