// A decision and its straight-through gradient, shared by CPU and CUDA. Entry `i` of an array
// [tokens, trees, levels] is the decision's.
#pragma once

#include "params.h"

namespace fff {

template <typename A>
FFF_HOST_DEVICE inline bool goes_right(const TreeForward& p, A score, int64_t i) {
  if (p.noise) {
    score += static_cast<const A*>(p.noise)[i];
  }
  return p.tie_right ? score >= A(0) : score > A(0);
}

// d decision / d score. Where it is 0, nobody need know what the branch not taken contributes.
template <typename A>
FFF_HOST_DEVICE inline A decision_slope(const TreeBackward& p, A score, int64_t i) {
  const A factor = p.alternates ? static_cast<const A*>(p.alternates)[i] : A(1);
  if (factor == A(0)) {
    return A(0);
  }
  const A slope = static_cast<A>(p.slope);
  const A c = sigmoid(slope * score);
  const A steepness = c * (A(1) - c);
  // A NaN is not flat: it reaches the gradients of its token.
  const bool flat = A(4) * steepness <= static_cast<A>(p.min_slope);
  return flat ? A(0) : factor * slope * steepness;
}

}  // namespace fff
