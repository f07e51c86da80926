// Which nodes and leaves lie on the paths of a batch: the rows of a row-sparse gradient.
#pragma once

#include <cstdint>
#include <vector>

#include "params.h"

namespace fff {

// Ids among those of all trees, ascending.
struct VisitedRows {
  std::vector<int64_t> nodes;
  std::vector<int64_t> leaves;  // empty without leaf networks
};

VisitedRows visited_rows(const TreeShape& s, const int64_t* leaf /* [tokens, trees] */);

}  // namespace fff
