// Which rows of weights, leaves or nodes, count for which tokens, where most do not.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "params.h"

namespace fff {

// Pairs of a token and a row. Blocks of tokens lie one after the other, so that what belongs to the
// tokens stays in the cache; within a block pairs are sorted by row, then by token.
struct RowPairs {
  std::vector<int64_t> tokens;  // [pairs]
  std::vector<RowRun> runs;     // of at most RowRun::kMostPairs
};

// Leaves whose weight in mixture [tokens, trees, leaves], contiguous on the CPU, is at least
// `prune` or the largest of its token and tree; NaN counts. Rows are numbered over all trees.
RowPairs kept_pairs(const at::Tensor& mixture, double prune);

// Rows whose value in `values` [tokens, rows], contiguous on the CPU, is not zero.
RowPairs nonzero_pairs(const at::Tensor& values);

}  // namespace fff
