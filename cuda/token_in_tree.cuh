// One token in one of the trees: scores, decisions and hidden activations.
#pragma once

#include "rows.cuh"

namespace fff::cuda {

// Row `row` of a weight, or null if the weight is absent.
template <typename T>
FFF_DEVICE const T* row_of(const void* weight, int64_t row, int64_t width) {
  return weight ? static_cast<const T*>(weight) + row * width : nullptr;
}

// All lanes of a warp call each method together and get the same value.
template <typename T>
class TokenInTree {
  using A = acc_t<T>;

 public:
  FFF_DEVICE TokenInTree(const TreeForward& p, int64_t token, int64_t tree)
      : p_(p), s_(p.shape), token_(token), tree_(tree) {}

  // This token and tree's first entry in an array [tokens, trees, width].
  FFF_DEVICE int64_t offset(int64_t width) const { return (token_ * s_.trees + tree_) * width; }

  FFF_DEVICE const T* node_weight(int64_t node) const {
    return row_of<T>(p_.weights.node_weight, tree_ * s_.nodes() + node, s_.input_width);
  }
  FFF_DEVICE const T* node_output(int64_t node) const {
    return row_of<T>(p_.weights.node_output, tree_ * s_.nodes() + node, s_.output_width);
  }
  FFF_DEVICE const T* w1(int64_t leaf, int64_t j) const {
    return row_of<T>(p_.weights.w1, neuron(leaf, j), s_.input_width);
  }
  FFF_DEVICE const T* w2(int64_t leaf, int64_t j) const {
    return row_of<T>(p_.weights.w2, neuron(leaf, j), s_.output_width);
  }
  FFF_DEVICE const T* b2(int64_t leaf) const {
    return row_of<T>(p_.weights.b2, tree_ * s_.leaves() + leaf, s_.output_width);
  }

  FFF_DEVICE A score(int64_t node) const {
    const T* bias = row_of<T>(p_.weights.node_bias, tree_ * s_.nodes() + node, 1);
    return dot_of_rows(node_weight(node), x(), s_.input_width) +
           (bias ? static_cast<A>(*bias) : A(0));
  }

  // <w1, x> + b1 of the leaf's neuron j.
  FFF_DEVICE A pre_activation(int64_t leaf, int64_t j) const {
    const T* bias = row_of<T>(p_.weights.b1, neuron(leaf, j), 1);
    return dot_of_rows(w1(leaf, j), x(), s_.input_width) + (bias ? static_cast<A>(*bias) : A(0));
  }

  // What multiplies the reached leaf's hidden activation j.
  FFF_DEVICE A leaf_scale(int64_t j) const {
    return p_.leaf_scale ? static_cast<const A*>(p_.leaf_scale)[offset(s_.leaf_width) + j] : A(1);
  }

 private:
  FFF_DEVICE const T* x() const { return row_of<T>(p_.x, token_, s_.input_width); }
  FFF_DEVICE int64_t neuron(int64_t leaf, int64_t j) const {
    return (tree_ * s_.leaves() + leaf) * s_.leaf_width + j;
  }

  const TreeForward& p_;
  const TreeShape& s_;
  const int64_t token_;
  const int64_t tree_;
};

}  // namespace fff::cuda
