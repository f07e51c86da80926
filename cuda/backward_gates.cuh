// Hard tree, backward: what is gathered of each pair of a token and a tree, and the gradients of
// its scores.
#pragma once

#include "decision.h"
#include "group.cuh"

namespace fff::cuda {

// A: the type of sums; H: that of hidden activations.
template <typename A, typename H>
struct BackwardGates {
  int64_t* leaf;            // [tokens, trees] inside the tree
  A* along;                 // [tokens, trees, levels] <gradient of the output, output row>
  int64_t leaf_parts;       // of what the leaf network puts out, if that is asked for
  A* leaf_value;            // [tokens, trees, leaf_parts] the same with these
  A* other;                 // [tokens, trees, decisions] with what the branch not taken puts out
  int64_t* other_position;  // [tokens, trees, decisions] how far that branch was followed, in slabs
  A* node_gate;             // [tokens, trees, levels] activation(score)
  A* score;                 // [tokens, trees, levels] gradient of the score
  H* hidden;                // [tokens, trees, leaf_width] activation, scaled
  H* grad_hidden;           // [tokens, trees, leaf_width] gradient of the pre-activation

  template <typename Queue>
  BackwardGates(const TreeBackward& p, int64_t parts, bool in_slabs, Queue& queue)
      : leaf_parts(p.straight_through ? parts : 0) {
    const TreeShape& s = p.forward.shape;
    const int64_t pairs = s.tokens * s.trees;
    const int64_t others = p.straight_through ? pairs * s.decisions : 0;
    leaf = queue.template array<int64_t>(pairs);
    along = queue.template array<A>(pairs * s.levels);
    leaf_value = queue.template array<A>(pairs * leaf_parts);
    other = queue.template array<A>(others);
    other_position = queue.template array<int64_t>(in_slabs ? others : 0);
    node_gate = queue.template array<A>(pairs * s.levels);
    score = queue.template array<A>(pairs * s.levels);
    hidden = queue.template array<H>(pairs * s.leaf_width);
    grad_hidden = queue.template array<H>(pairs * s.leaf_width);
  }
};

struct CopyLeaves {
  TreeShape shape;
  const int64_t* from;
  int64_t* to;

  FFF_DEVICE void operator()(int64_t pair, bool exists) const {
    if (exists) {
      to[pair] = shape.inside(from[pair]);
    }
  }
};

// For a pair, from the leaf up, so that what the taken side of each decision contributes is at hand
// there.
template <typename A, typename H>
struct ScoreGradients {
  TreeBackward p;
  BackwardGates<A, H> gates;

  FFF_DEVICE void operator()(int64_t pair, bool exists) const {
    if (!exists) {
      return;
    }
    const TreeForward& f = p.forward;
    const TreeShape& s = f.shape;
    const int64_t leaf = gates.leaf[pair];
    A taken = A(0);
    for (int64_t part = 0; part < gates.leaf_parts; ++part) {
      taken += gates.leaf_value[pair * gates.leaf_parts + part];
    }
    for (int level = s.levels - 1; level >= 0; --level) {
      const int64_t i = pair * s.levels + level;
      const A score = static_cast<const A*>(p.scores)[i];
      A grad = p.grad_scores ? static_cast<const A*>(p.grad_scores)[i] : A(0);
      const bool decides = p.straight_through && level < s.decisions;
      const A slope = decides ? decision_slope(p, score, i) : A(0);
      if (slope != A(0)) {
        const A other = gates.other[pair * s.decisions + level];
        grad += slope * (s.turns_right(leaf, level) ? taken - other : other - taken);
      }
      if (f.weights.node_output) {
        const A along = gates.along[i];
        const A gate = activate(f.node_activation, score);
        grad += along * activation_slope(f.node_activation, score);
        taken += gate * along;
        gates.node_gate[i] = gate;
      }
      gates.score[i] = grad;
    }
  }
};

}  // namespace fff::cuda
