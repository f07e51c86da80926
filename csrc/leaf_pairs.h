// Which leaves of a soft tree count for which tokens, when the light ones are pruned.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "params.h"

namespace fff {

// Pairs of a token and a leaf. Blocks of tokens lie one after the other, so that their rows of the
// output stay in the cache; within a block pairs are sorted by leaf, then by token.
struct LeafPairs {
  std::vector<int64_t> tokens;  // [pairs]
  std::vector<LeafRun> runs;    // of at most LeafRun::kMostPairs
};

// The pairs whose weight in mixture [tokens, trees, leaves], contiguous on the CPU, is at least
// `prune` or the largest of its token and tree; NaN counts.
LeafPairs kept_pairs(const at::Tensor& mixture, double prune);

}  // namespace fff
