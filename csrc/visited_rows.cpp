#include "visited_rows.h"

#include <algorithm>

namespace fff {

VisitedRows visited_rows(const TreeShape& s, const int64_t* leaf) {
  VisitedRows visited;
  std::vector<int64_t> reached(s.tokens);
  for (int64_t tree = 0; tree < s.trees; ++tree) {
    reached.resize(s.tokens);
    for (int64_t token = 0; token < s.tokens; ++token) {
      reached[token] = s.inside(leaf[token * s.trees + tree]);
    }
    std::sort(reached.begin(), reached.end());
    reached.erase(std::unique(reached.begin(), reached.end()), reached.end());
    for (int level = 0; level < s.levels; ++level) {
      int64_t last = -1;
      for (const int64_t at : reached) {
        const int64_t node = tree * s.nodes() + s.node_on_path(at, level);
        if (node != last) {
          visited.nodes.push_back(node);
        }
        last = node;
      }
    }
    for (const int64_t at : reached) {
      if (s.leaf_width > 0) {
        visited.leaves.push_back(tree * s.leaves() + at);
      }
    }
  }
  return visited;
}

}  // namespace fff
