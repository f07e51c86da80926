// Where the gradients of the weights on a path lie: arrays have every row, or only given ones.
#pragma once

#include <algorithm>
#include <vector>

#include "leaf_order.h"

namespace fff::cpu {
inline namespace CPU_CAPABILITY {

class GradientRows {
 public:
  GradientRows(const TreeBackward& p, int64_t tree, const LeafOrder& order)
      : levels_(p.forward.shape.levels),
        nodes_(order.runs.size() * levels_),
        leaves_(order.runs.size()) {
    const TreeShape& s = p.forward.shape;
    if (s.leaf_width > 0) {
      Search leaf_row(p.leaves);
      for (size_t run = 0; run < order.runs.size(); ++run) {
        leaves_[run] = leaf_row(tree * s.leaves() + order.runs[run].leaf);
      }
    }
    for (int level = 0; level < levels_; ++level) {
      Search node_row(p.nodes);
      for (size_t run = 0; run < order.runs.size(); ++run) {
        const int64_t node = s.node_on_path(order.runs[run].leaf, level);
        nodes_[run * levels_ + level] = node_row(tree * s.nodes() + node);
      }
    }
  }

  // [levels] of a run's nodes, from the root on.
  const int64_t* nodes(int64_t run) const { return nodes_.data() + run * levels_; }
  int64_t leaf(int64_t run) const { return leaves_[run]; }

 private:
  // The rows of ascending ids.
  class Search {
   public:
    explicit Search(const RowIds& rows)
        : begin_(rows.ids), end_(rows.ids + rows.count), at_(rows.ids) {}

    int64_t operator()(int64_t id) {
      if (!begin_) {
        return id;
      }
      if (*at_ != id) {
        at_ = std::lower_bound(at_, end_, id);
      }
      return at_ - begin_;
    }

   private:
    const int64_t* begin_;
    const int64_t* end_;
    const int64_t* at_;
  };

  const int levels_;
  std::vector<int64_t> nodes_;   // [runs, levels]
  std::vector<int64_t> leaves_;  // [runs]
};

}  // namespace CPU_CAPABILITY
}  // namespace fff::cpu
