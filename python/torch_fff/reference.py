"""The definitions, in plain dense torch: the specification of this package.

Every function here evaluates all nodes and all leaves of a tree, on any device and dtype, and gets
its gradients from autograd. It is meant to be read and compared with; ``torch_fff.functional``
computes the same in O(depth).

Shapes, with K = ``trees``, n = 2^levels - 1 nodes and 2^levels leaves per tree:

===========  ===================  ===============================================================
x            [..., in]            tokens
node_weight  [K * n, in]          one hyperplane per node, tree after tree, each in heap order: the
                                  children of node i are 2i + 1 (left) and 2i + 2 (right)
node_bias    [K * n]              optional
node_output  [K * n, out]         optional: the output rows of nodes that are neurons as well
w1           [K * leaves, l, in]  leaf networks, x -> act(x @ w1.T + b1) @ w2 + b2
b1           [K * leaves, l]      optional
w2           [K * leaves, l, out]
b2           [K * leaves, out]    optional
===========  ===================  ===============================================================

A tree without leaf networks (w1 and w2 None) has node outputs, and the decisions of its last level
route nothing. The outputs of the K trees add up. Arithmetic is in float64 for float64 tokens and in
float32 otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class TreeOutput(NamedTuple):
    """What a hard tree returns.

    output: [..., out], dtype of x.
    scores: [..., K, levels], scores of the visited nodes; float64 for float64 x, float32 otherwise.
    leaf: [..., K] int64, the leaf reached; without leaf networks the position of the last visited
        node in its level.
    """

    output: Tensor
    scores: Tensor
    leaf: Tensor


class SoftTreeOutput(NamedTuple):
    """What a soft tree returns.

    output: [..., out].
    node_logits: [..., K, n], scores of all nodes, before a leak.
    mixture: [..., K, 2^levels], weights of all leaves, after a leak.
    """

    output: Tensor
    node_logits: Tensor
    mixture: Tensor


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "identity": lambda x: x,
}


def leaf_mixture(node_logits: Tensor) -> Tensor:
    """Weights of the leaves, [..., 2^d - 1] -> [..., 2^d].

    A leaf's weight is the product over its path of sigmoid(z) where the path turns right and of
    1 - sigmoid(z) = sigmoid(-z) where it turns left.
    """
    return _spread(torch.sigmoid(node_logits), torch.sigmoid(-node_logits))[1]


def gated_activation(pre: Tensor, mixture: Tensor, activation: str = "relu") -> Tensor:
    """activation(pre) times the weight of its leaf.

    pre [..., leaves * l], mixture [..., leaves] -> [..., leaves * l].
    """
    leaf_width = pre.shape[-1] // mixture.shape[-1]
    return ACTIVATIONS[activation](pre) * mixture.repeat_interleave(leaf_width, -1)


def prune_mixture(mixture: Tensor, prune: float) -> Tensor:
    """The weights of the leaves [..., leaves] without the light ones, which become 0.

    A leaf stays if its weight is at least ``prune``, or the largest: one leaf always does. NaN
    stays. The others keep their weights, so that less than ``prune * leaves`` is missing from
    their sum.
    """
    largest = mixture.detach().amax(-1, keepdim=True)
    return mixture.masked_fill(mixture < largest.clamp(max=prune), 0)


def node_reach(mixture: Tensor) -> Tensor:
    """Weight with which each node is reached, [..., 2^d] -> [..., 2^d - 1] in heap order.

    It is the sum of the mixture over the leaves below the node; 1 at the root.
    """
    levels = []
    while mixture.shape[-1] > 1:
        mixture = mixture.reshape(*mixture.shape[:-1], mixture.shape[-1] // 2, 2).sum(-1)
        levels.append(mixture)
    return torch.cat([mixture[..., :0], *reversed(levels)], -1)


def add_leaf_base(base: Tensor, own: Tensor) -> Tensor:
    """Weights of leaves that share a base: [K, ...] + [K * leaves, ...] -> [K * leaves, ...].

    Leaf f of tree k has base[k] + own[k * leaves + f]. Each of w1, b1, w2 and b2 of the functions
    below may be such a sum.
    """
    weights: Tensor = base.unsqueeze(1) + own.unflatten(0, (len(base), -1))
    return weights.flatten(0, 1)


def add_level_base(base: Tensor, own: Tensor) -> Tensor:
    """Weights of nodes that share a base with their level, n = 2^levels - 1 in each of K trees.

    [K, levels, ...] + [K * n, ...] -> [K * n, ...]: node i of tree k, on level floor(log2(i + 1)),
    has base[k, level] + own[k * n + i]. Each of the node weights, biases and outputs of the
    functions below may be such a sum.
    """
    # Level by level, so that the base's gradient is a plain sum over slices.
    sizes = [2**level for level in range(base.shape[1])]
    levels = own.unflatten(0, (len(base), -1)).split(sizes, 1)
    sums = [b.unsqueeze(1) + rows for b, rows in zip(base.unbind(1), levels, strict=True)]
    return torch.cat(sums, 1).flatten(0, 1)


def soft_tree(
    x: Tensor,
    node_weight: Tensor,
    node_bias: Tensor | None = None,
    node_output: Tensor | None = None,
    w1: Tensor | None = None,
    b1: Tensor | None = None,
    w2: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    leak: Tensor | None = None,
    hidden_scale: Tensor | None = None,
    prune: float = 0.0,
    trees: int = 1,
    node_activation: str = "identity",
    leaf_activation: str = "relu",
) -> SoftTreeOutput:
    """The training forward of arXiv 2308.14711: a mixture over all leaves.

    out(node) = c * out(right child) + (1 - c) * out(left child), c = sigmoid(s), where
    s = <x, node_weight> + node_bias; a node with an output row adds act(s) * node_output.
    ``leak`` [..., K, n] (bool) turns c into 1 - c where it is true; ``hidden_scale``
    [..., K, leaves, l] multiplies the hidden activations of the leaves (dropout). With ``prune``
    the sum over the leaves is cut to those that :func:`prune_mixture` leaves of each tree, and so
    are the gradients; nodes and the mixture that is returned are not.
    """
    logits = _all_scores(x, node_weight, node_bias, trees)
    c = torch.sigmoid(logits)
    if leak is not None:
        c = torch.where(leak, 1 - c, c)
    reach, mixture = _spread(c, 1 - c)
    output = _sum_of_nodes(logits, reach, node_output, node_activation)
    kept = prune_mixture(mixture, prune)
    output = output + _sum_of_leaves(x, kept, w1, b1, w2, b2, hidden_scale, leaf_activation)
    return SoftTreeOutput(output.to(x.dtype), logits.to(x.dtype), mixture.to(x.dtype))


def descend(
    x: Tensor,
    node_weight: Tensor,
    node_bias: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    trees: int = 1,
    tie_right: bool = True,
) -> tuple[Tensor, Tensor]:
    """Route every token: scores [..., K, levels] of the nodes it visits, leaf [..., K] it reaches.

    A node sends a token right iff s + noise >= 0 (``tie_right``) or > 0, where
    s = <x, node_weight> + node_bias and ``noise`` [..., K, levels] holds a value per level;
    a NaN goes left.
    """
    logits = _all_scores(x, node_weight, node_bias, trees).detach()
    return _follow(logits, _decisions(logits, noise, tie_right))


def tree(
    x: Tensor,
    node_weight: Tensor,
    node_bias: Tensor | None = None,
    node_output: Tensor | None = None,
    w1: Tensor | None = None,
    b1: Tensor | None = None,
    w2: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    leaf_scale: Tensor | None = None,
    alternates: Tensor | None = None,
    trees: int = 1,
    tie_right: bool = True,
    node_activation: str = "identity",
    leaf_activation: str = "relu",
    straight_through: bool = False,
    slope: float = 1.0,
    min_slope: float = 0.0,
) -> TreeOutput:
    """One path per token and tree, the one that :func:`descend` takes.

    A visited node with an output row adds act(s) * node_output (arXiv 2311.10770); the leaf reached
    adds sum_j leaf_scale_j * act(<x, w1_j> + b1_j) * w2_j + b2, ``leaf_scale`` [..., K, l]. An
    output bias of a layer is added to ``output``, as to any sum.

    Decisions are c = 0 or 1. With ``straight_through`` they carry the gradient of a sigmoid,
    c = c_hard + sigmoid(slope * s) - stop(sigmoid(slope * s)), which the noise does not enter;
    without it routing has no gradient. ``alternates`` [..., K, levels] multiplies the gradient of
    the decision at each level. Decisions with 4 * sigmoid'(slope * s) <= ``min_slope``, a share of
    the sigmoid's greatest slope, have none.
    """
    logits = _all_scores(x, node_weight, node_bias, trees)
    right = _decisions(logits.detach(), noise, tie_right)
    c = right.to(logits.dtype)
    if straight_through:
        soft = torch.sigmoid(slope * logits)
        through = soft - soft.detach()
        if alternates is not None:
            through = through * _of_nodes(alternates)
        flat = 4 * soft * (1 - soft) <= min_slope
        c = c + through.masked_fill(flat, 0)
    reach, mixture = _spread(c, 1 - c)
    hidden_scale = None if leaf_scale is None else leaf_scale.unsqueeze(-2)
    output = _sum_of_nodes(logits, reach, node_output, node_activation)
    output = output + _sum_of_leaves(x, mixture, w1, b1, w2, b2, hidden_scale, leaf_activation)
    scores, leaf = _follow(logits, right)
    return TreeOutput(output.to(x.dtype), scores, leaf // 2 if w1 is None else leaf)


def _all_scores(x: Tensor, weight: Tensor, bias: Tensor | None, trees: int) -> Tensor:
    """Scores of all nodes, [..., K, n]."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    scores = F.linear(x.to(exact), weight.to(exact), None if bias is None else bias.to(exact))
    return scores.reshape(*x.shape[:-1], trees, weight.shape[0] // trees)


def _levels(nodes: int) -> int:
    return (nodes + 1).bit_length() - 1


def _spread(right: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of all branches [..., n] -> of all nodes [..., n] and of all leaves [..., n + 1]."""
    reached = right.new_ones((*right.shape[:-1], 1))
    levels = [right[..., :0]]
    for level in range(_levels(right.shape[-1])):
        nodes = slice(2**level - 1, 2 ** (level + 1) - 1)
        levels.append(reached)
        children = (reached * left[..., nodes], reached * right[..., nodes])
        reached = torch.stack(children, -1).flatten(-2)
    return torch.cat(levels, -1), reached


def _of_nodes(of_levels: Tensor) -> Tensor:
    """The value of its level for every node, [..., levels] -> [..., n]."""
    levels = of_levels.shape[-1]
    return of_levels[..., [level for level in range(levels) for _ in range(2**level)]]


def _decisions(logits: Tensor, noise: Tensor | None, tie_right: bool) -> Tensor:
    """Whether each node sends its token right, bool [..., K, n]."""
    if noise is not None:
        logits = logits + _of_nodes(noise)
    return logits >= 0 if tie_right else logits > 0


def _follow(logits: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [..., K, levels] of the nodes on the path, and the leaf [..., K] it ends in."""
    node = right.new_zeros((*right.shape[:-1], 1), dtype=torch.int64)
    path = [node[..., :0]]
    for _ in range(_levels(right.shape[-1])):
        path.append(node)
        node = 2 * node + 1 + right.gather(-1, node)
    return logits.gather(-1, torch.cat(path, -1)), node.squeeze(-1) - right.shape[-1]


def _sum_of_nodes(logits: Tensor, reach: Tensor, output: Tensor | None, activation: str) -> Tensor:
    if output is None:
        return logits.new_zeros(())
    value = ACTIVATIONS[activation](logits) * reach
    return torch.matmul(value.flatten(-2), output.to(value.dtype))


def _sum_of_leaves(
    x: Tensor,
    mixture: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    hidden_scale: Tensor | None,
    activation: str,
) -> Tensor:
    if w1 is None or w2 is None:
        return mixture.new_zeros(())

    def leaves(weight: Tensor) -> Tensor:  # [K * leaves, ...] -> [K, leaves, ...]
        return weight.to(mixture.dtype).reshape(*mixture.shape[-2:], *weight.shape[1:])

    hidden = torch.einsum("...i,kfli->...kfl", x.to(mixture.dtype), leaves(w1))
    if b1 is not None:
        hidden = hidden + leaves(b1)
    hidden = ACTIVATIONS[activation](hidden)
    if hidden_scale is not None:
        hidden = hidden * hidden_scale
    value = torch.einsum("...kfl,kflo->...kfo", hidden, leaves(w2))
    if b2 is not None:
        value = value + leaves(b2)
    return torch.einsum("...kf,...kfo->...o", mixture, value)
