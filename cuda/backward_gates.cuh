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

// The child not taken at `level` of a pair's path, descended hard: <gradient of the output, what
// its nodes contribute> and the leaf that it reaches.
template <typename A>
struct OtherBranch {
  A value;
  int64_t leaf;
};

// score_of(node), and along_of(node) where there are output rows.
template <typename A, typename ScoreOf, typename AlongOf>
FFF_DEVICE OtherBranch<A> follow_other(const TreeForward& f, int64_t pair, int64_t leaf, int level,
                                       const ScoreOf& score_of, const AlongOf& along_of) {
  const TreeShape& s = f.shape;
  int64_t position = (leaf >> (s.decisions - 1 - level)) ^ 1;
  A value = A(0);
  for (++level; level < s.levels; ++level) {
    const int64_t node = (int64_t(1) << level) - 1 + position;
    const A score = score_of(node);
    if (f.weights.node_output) {
      value += activate(f.node_activation, score) * along_of(node);
    }
    if (level < s.decisions) {
      position = 2 * position + goes_right(f, score, pair * s.levels + level);
    }
  }
  return {value, position};
}

// The gradients of a pair's scores, put(level, activation(score), gradient), from the leaf up, so
// that what the taken side of each decision contributes, the leaf network `taken`, is at hand
// there. along_of(level) where there are output rows, other_of(level) of decisions with a slope.
template <typename A, typename AlongOf, typename OtherOf, typename Put>
FFF_DEVICE void score_gradients(const TreeBackward& p, int64_t pair, int64_t leaf, A taken,
                                const AlongOf& along_of, const OtherOf& other_of, const Put& put) {
  const TreeForward& f = p.forward;
  const TreeShape& s = f.shape;
  for (int level = s.levels - 1; level >= 0; --level) {
    const int64_t i = pair * s.levels + level;
    const A score = static_cast<const A*>(p.scores)[i];
    A grad = p.grad_scores ? static_cast<const A*>(p.grad_scores)[i] : A(0);
    const bool decides = p.straight_through && level < s.decisions;
    const A slope = decides ? decision_slope(p, score, i) : A(0);
    if (slope != A(0)) {
      const A other = other_of(level);
      grad += slope * (s.turns_right(leaf, level) ? taken - other : other - taken);
    }
    const A gate = activate(f.node_activation, score);
    if (f.weights.node_output) {
      const A along = along_of(level);
      grad += along * activation_slope(f.node_activation, score);
      taken += gate * along;
    }
    put(level, gate, grad);
  }
}

template <typename A, typename H>
struct ScoreGradients {
  TreeBackward p;
  BackwardGates<A, H> gates;

  FFF_DEVICE void operator()(int64_t pair, bool exists) const {
    if (!exists) {
      return;
    }
    const TreeShape& s = p.forward.shape;
    A taken = A(0);
    for (int64_t part = 0; part < gates.leaf_parts; ++part) {
      taken += gates.leaf_value[pair * gates.leaf_parts + part];
    }
    score_gradients(
        p, pair, gates.leaf[pair], taken,
        [&](int level) { return gates.along[pair * s.levels + level]; },
        [&](int level) { return gates.other[pair * s.decisions + level]; },
        [&](int level, A gate, A grad) {
          gates.node_gate[pair * s.levels + level] = gate;
          gates.score[pair * s.levels + level] = grad;
        });
  }
};

}  // namespace fff::cuda
