// Hard tree, forward: how the tokens are cut into groups that walk together.
//
// One pass: chunks of tokens walk all levels of every tree; for few tokens, and for shallow trees,
// whose rows fit the cache.
//
// Two passes, for deep trees or wide leaves and many tokens: chunks walk the top levels in the
// order in which they lie in memory, are sorted by the subtree they reach, and finish there
// together. A token is read twice, and a subtree's rows stay in the cache while all its tokens
// pass.
//
// How the work is cut depends on the shapes alone, never on the number of threads, so that results
// do not either.
#pragma once

#include <ATen/Parallel.h>

#include <numeric>

#include "tree_emit.h"
#include "tree_walk.h"

namespace fff::cpu {
inline namespace CPU_CAPABILITY {

namespace {

constexpr int64_t kChunk = 256;          // tokens whose x fits a second-level cache
constexpr int64_t kDeepChunk = 32;       // the same where rows compete for that cache
constexpr int64_t kTwoPassTokens = 256;  // from here on the second pass pays for deep trees
constexpr int kCacheLevels = 6;          // levels of a subtree whose rows fit a second-level cache
constexpr int64_t kCellTokens = 64;      // tokens a subtree should receive on average, at least
constexpr int64_t kWideLeaf = 16;        // neurons of a leaf that outweigh a second reading of x
constexpr int64_t kWideLeafTokens = 8;   // from here on the second pass pays for wide leaves
constexpr int64_t kLeafTokens = 128;     // tokens that pass a wide leaf together
constexpr int64_t kForestBlock = 4096;   // tokens whose output stays in the cache from tree to tree

// Levels of the first pass; 0 for a single pass.
inline int top_levels(const TreeShape& s) {
  // So that a leaf's tokens all arrive together, unless leaves are too many to be shared: sorting
  // costs as much as there are.
  if (s.leaf_width >= kWideLeaf && s.tokens >= kWideLeafTokens && s.leaves() <= 4 * s.tokens) {
    return s.levels;
  }
  if (s.tokens < kTwoPassTokens) {
    return 0;
  }
  int levels = 1;
  while ((s.tokens >> (levels + 1)) >= kCellTokens) {
    ++levels;
  }
  return std::clamp(s.levels - kCacheLevels, 0, levels);
}

// Tokens that walk all levels together: a part of them, so that threads can share the work, within
// bounds. A forest is read from memory once per chunk: fewer and larger ones.
inline int64_t one_pass_chunk(const TreeShape& s) {
  const int64_t chunks = s.trees > 1 ? 2 : 4;
  const int64_t most = s.levels > kCacheLevels + 1 ? kDeepChunk : kChunk;
  return std::clamp<int64_t>(s.tokens / chunks, 4, most);
}

template <typename T>
class Pass {
 public:
  explicit Pass(const TreeForward& p) : p_(p), walker_(p), emit_(p) {}

  void enter(int64_t tree) {
    walker_.enter(tree);
    emit_.enter(tree);
  }

  // The walk of tokens [first, first + count) down the top levels: the cell of each.
  void walk_top(int top, int64_t first, int64_t count, int64_t* cell_of) {
    walker_.walk(0, 0, top, consecutive(first, count), count,
                 [&](int64_t cell, const int64_t* arrived, int64_t n) {
                   for (int64_t i = 0; i < n; ++i) {
                     cell_of[arrived[i]] = cell;
                   }
                 });
  }

  // Finishes the walk of tokens that stand at `position` of `level`.
  void finish(int64_t position, int level, int64_t* tokens, int64_t count) {
    walker_.walk(position, level, p_.shape.decisions, tokens, count,
                 [&](int64_t leaf, const int64_t* arrived, int64_t n) {
                   if (p_.shape.decisions < p_.shape.levels) {
                     walker_.score_last(leaf, arrived, n);
                   }
                   emit_(leaf, arrived, n);
                 });
  }

  // Tokens [first, first + count), to be reordered.
  int64_t* consecutive(int64_t first, int64_t count) {
    order_.resize(count);
    std::iota(order_.begin(), order_.end(), first);
    return order_.data();
  }

 private:
  const TreeForward& p_;
  Walker<T> walker_;
  Emitter<T> emit_;
  std::vector<int64_t> order_;
};

template <typename T>
void forward_one_pass(const TreeForward& p) {
  const int64_t tokens = p.shape.tokens;
  const int64_t chunk = one_pass_chunk(p.shape);
  at::parallel_for(0, (tokens + chunk - 1) / chunk, 1, [&](int64_t begin, int64_t end) {
    Pass<T> pass(p);
    for (int64_t c = begin; c < end; ++c) {
      const int64_t count = std::min(chunk, tokens - c * chunk);
      for (int64_t tree = 0; tree < p.shape.trees; ++tree) {
        pass.enter(tree);
        pass.finish(0, 0, pass.consecutive(c * chunk, count), count);
      }
    }
    stream_fence();
  });
}

// Tokens of one subtree that finish together: `count` from `begin` on in the sorted order.
struct Job {
  int64_t cell;
  int64_t begin;
  int64_t count;
};

// The tokens [first, last) sorted by cell, and the jobs of at most `most` tokens that they make.
inline void sort_by_cell(const std::vector<int64_t>& cell_of, int64_t cells, int64_t most,
                         int64_t first, int64_t last, std::vector<int64_t>& order,
                         std::vector<Job>& jobs) {
  std::vector<int64_t> start(cells + 1);
  for (int64_t t = first; t < last; ++t) {
    ++start[cell_of[t] + 1];
  }
  std::partial_sum(start.begin(), start.end(), start.begin());
  jobs.clear();
  for (int64_t cell = 0; cell < cells; ++cell) {
    for (int64_t at = start[cell]; at < start[cell + 1]; at += most) {
      jobs.push_back({cell, at, std::min(most, start[cell + 1] - at)});
    }
  }
  order.resize(last - first);
  for (int64_t t = first; t < last; ++t) {
    order[start[cell_of[t]]++] = t;
  }
}

template <typename T>
void forward_two_pass(const TreeForward& p, int top) {
  const int64_t tokens = p.shape.tokens;
  const int64_t block = p.shape.trees == 1 ? tokens : kForestBlock;
  const int64_t job_tokens = p.shape.leaf_width >= kWideLeaf ? kLeafTokens : 4 * kChunk;
  std::vector<int64_t> cell_of(tokens), order;
  std::vector<Job> jobs;
  for (int64_t first = 0; first < tokens; first += block) {
    const int64_t last = std::min(first + block, tokens);
    for (int64_t tree = 0; tree < p.shape.trees; ++tree) {
      const int64_t chunks = (last - first + kChunk - 1) / kChunk;
      at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
        Pass<T> pass(p);
        pass.enter(tree);
        for (int64_t c = begin; c < end; ++c) {
          const int64_t at = first + c * kChunk;
          pass.walk_top(top, at, std::min(kChunk, last - at), cell_of.data());
        }
      });
      sort_by_cell(cell_of, int64_t(1) << top, job_tokens, first, last, order, jobs);
      at::parallel_for(0, static_cast<int64_t>(jobs.size()), 1, [&](int64_t begin, int64_t end) {
        Pass<T> pass(p);
        pass.enter(tree);
        for (int64_t j = begin; j < end; ++j) {
          pass.finish(jobs[j].cell, top, order.data() + jobs[j].begin, jobs[j].count);
        }
        stream_fence();
      });
    }
  }
}

}  // namespace

inline void tree_forward(const TreeForward& p) {
  dispatch(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const int top = top_levels(p.shape);
    if (top == 0) {
      forward_one_pass<T>(p);
    } else {
      forward_two_pass<T>(p, top);
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace fff::cpu
