// The tokens of one tree sorted by the leaf they reached, so that those who share rows lie
// together.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "../params.h"

namespace fff::cpu {
inline namespace CPU_CAPABILITY {

// Consecutive tokens, in leaf order, that reached the same leaf.
struct Run {
  int64_t leaf;
  int64_t begin;
  int64_t count;
};

struct LeafOrder {
  std::vector<int64_t> tokens;  // [tokens] token indices
  std::vector<int64_t> leaf;    // [tokens] the leaf of each, ascending
  std::vector<Run> runs;        // of at most kRunTokens

  static constexpr int64_t kRunTokens = 64;

  LeafOrder(const TreeShape& s, const int64_t* leaf_of /* [tokens, trees] */, int64_t tree)
      : tokens(s.tokens), leaf(s.tokens) {
    const auto key = [&](int64_t token) { return s.inside(leaf_of[token * s.trees + tree]); };
    if (s.leaves() <= 4 * s.tokens) {
      std::vector<int64_t> start(s.leaves() + 1);
      for (int64_t t = 0; t < s.tokens; ++t) {
        ++start[key(t) + 1];
      }
      std::partial_sum(start.begin(), start.end(), start.begin());
      for (int64_t t = 0; t < s.tokens; ++t) {
        tokens[start[key(t)]++] = t;
      }
    } else {
      std::iota(tokens.begin(), tokens.end(), 0);
      std::stable_sort(tokens.begin(), tokens.end(),
                       [&](int64_t a, int64_t b) { return key(a) < key(b); });
    }
    std::transform(tokens.begin(), tokens.end(), leaf.begin(), key);
    for (int64_t i = 0; i < s.tokens;) {
      int64_t end = i + 1;
      while (end < s.tokens && end - i < kRunTokens && leaf[end] == leaf[i]) {
        ++end;
      }
      runs.push_back({leaf[i], i, end - i});
      i = end;
    }
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace fff::cpu
