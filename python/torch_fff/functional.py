"""Fast feedforward trees as functions of tensors.

Shapes, with K = ``trees``, n = 2^levels - 1 nodes and 2^levels leaves per tree:

===========  ===================  ===============================================================
x            [..., in]            tokens, with any leading dimensions
node_weight  [K * n, in]          one hyperplane per node, tree after tree, each in heap order: the
                                  children of node i are 2i + 1 (left) and 2i + 2 (right)
node_bias    [K * n]              optional
node_output  [K * n, out]         optional: the output rows of nodes that are neurons as well
w1           [K * leaves, l, in]  leaf networks, x -> act(x @ w1.T + b1) @ w2 + b2
b1           [K * leaves, l]      optional
w2           [K * leaves, l, out]
b2           [K * leaves, out]    optional
===========  ===================  ===============================================================

These are two forms of one family. With leaf networks a token is routed through ``levels`` >= 0
nodes to a leaf. Without (w1 and w2 None) it is a tree of neurons: nodes have outputs, there is at
least one level, and the last one's decision routes nothing. The outputs of the K trees add up.

x and all weights share one device and one dtype: float32, float64, bfloat16 or float16, accumulated
in float32 (float64 for float64); autocast casts them to its dtype. Any strides and zero tokens are
fine. A NaN in a token makes the output of that token NaN. Activations are "relu", "gelu" (erf),
"gelu_tanh", "silu" and "identity". Gradients can be taken once: there is no double backward.
torch.func transforms work; inside torch.compile vmap does, and grad does not.

A wrong shape, dtype, device or activation is an error that names the function, the argument, what
was expected and what was given: a RuntimeError or ValueError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _functorch
from ._arguments import check_choice, check_number, reject
from ._linear import linear
from .reference import ACTIVATIONS, SoftTreeOutput, TreeOutput, node_reach, prune_mixture

__all__ = [
    "SoftTreeOutput",
    "TreeOutput",
    "bernoulli_entropy",
    "descend",
    "gated_activation",
    "leaf_mixture",
    "node_reach",
    "prune_mixture",
    "soft_tree",
    "tree",
]

_ACTIVATIONS = tuple(ACTIVATIONS)
# Looked up once: one token takes a few microseconds in all.
_tree = torch.ops.fff.tree.default
_descend = torch.ops.fff.descend.default
_leaf_mixture = torch.ops.fff.leaf_mixture.default
_gated_activation = torch.ops.fff.gated_activation.default
_sparse_leaves = torch.ops.fff.sparse_leaves.default
_transforms_active = torch._C._are_functorch_transforms_active


def _differentiable(op: Any, transformable: Callable[..., Any]) -> Any:
    """``op``, or its transformable form where a torch.func transform is active."""
    if _transforms_active() and not torch.compiler.is_compiling():
        return transformable
    return op


def _row_sparse(op: Any) -> Any:
    """``op``, whose backward gives sparse tensors, which eager autograd alone takes."""
    if torch.compiler.is_dynamo_compiling():
        reject("tree", "row_sparse_grad", "False under torch.compile", True)
    if _transforms_active():
        reject("tree", "row_sparse_grad", "False under a torch.func transform", True)
    return op


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
    row_sparse_grad: bool = False,
) -> TreeOutput:
    """Hard trees: every token takes one path per tree, and only what it visits is computed.

    A node with score s = <x, node_weight> + node_bias sends a token right iff s + noise >= 0
    (``tie_right``, as in arXiv 2308.14711) or s + noise > 0 (as in arXiv 2311.10770); a NaN goes
    left. Over the path from the root to the leaf,

        output = sum_visited node_activation(s) * node_output
                 + sum_j leaf_scale_j * leaf_activation(<x, w1_j> + b1_j) * w2_j + b2.

    Args:
        noise: [..., K, levels], dtype of the scores; one value per level. Not differentiable.
        leaf_scale: [..., K, l], dtype of the scores; multiplies the hidden activations of whichever
            leaf is reached (dropout). Not differentiable.
        alternates: [..., K, levels], dtype of the scores; a factor of the straight-through gradient
            of the decision at each level. Where it is 0 the branch not taken is not evaluated. Not
            differentiable.
        trees: K.
        straight_through: gives each decision the gradient of a sigmoid. A visited node gets
            ds += <grad_output, y_right - y_left> * slope * sigmoid'(slope * s), where y_right and
            y_left are what its two subtrees contribute when descended hard. Otherwise routing has
            no gradient. The output is the same.
        slope: of that sigmoid; > 0.
        min_slope: in [0, 1]; decisions with 4 * sigmoid'(slope * s) <= min_slope, a share of the
            sigmoid's greatest slope, get no straight-through gradient, and their branch not taken
            is not evaluated. At 0 these are the decisions whose slope has become 0 in floating
            point.
        row_sparse_grad: gives the weights gradients that are coalesced sparse tensors of the rows
            (nodes and leaves) that some token visits, as ``torch.nn.Embedding(sparse=True)`` does,
            so that backward costs nothing for the others. Backward is an error on other devices
            than the CPU, and the call is one under torch.func transforms, where autocast casts
            weights, and under torch.compile with fullgraph=True; without it the calling code runs
            in eager mode.

    Returns:
        output [..., out], scores [..., K, levels] and leaf [..., K]: see :class:`TreeOutput`.
    """
    return TreeOutput(
        *run_tree(
            min_slope,
            row_sparse_grad,
            x,
            node_weight,
            node_bias,
            node_output,
            w1,
            b1,
            w2,
            b2,
            noise,
            leaf_scale,
            alternates,
            trees,
            tie_right,
            node_activation,
            leaf_activation,
            straight_through,
            slope,
        )
    )


def run_tree(
    min_slope: float, row_sparse_grad: bool, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`tree` for the layers: the operator's other arguments by position, and a plain tuple.

    One token takes a few microseconds in all, of which names cost a tenth.
    """
    if row_sparse_grad and torch.is_grad_enabled():
        op = _row_sparse(_tree)
    else:
        op = _differentiable(_tree, _functorch.tree)
    # An argument costs a tenth of a microsecond, even if it has its default value.
    if min_slope or row_sparse_grad:
        arguments += (min_slope, row_sparse_grad)
    result: tuple[Tensor, Tensor, Tensor] = op(*arguments)
    return result


def descend(
    x: Tensor,
    node_weight: Tensor,
    node_bias: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    trees: int = 1,
    tie_right: bool = True,
) -> tuple[Tensor, Tensor]:
    """The path of every token without its output: routes as :func:`tree` does. Not differentiable.

    Returns:
        scores [..., K, levels] of the visited nodes (float64 for float64 x, float32 otherwise) and
        leaf [..., K] int64 in [0, 2^levels), counted after the decisions of all levels.
    """
    scores, leaf = _descend(x, node_weight, node_bias, noise, trees, tie_right)
    return scores, leaf


def leaf_mixture(node_logits: Tensor) -> Tensor:
    """Weights of the leaves of a soft tree, [..., 2^d - 1] -> [..., 2^d], same dtype.

    mixture_leaf is the product over the leaf's path of sigmoid(z) where the path turns right and of
    sigmoid(-z) = 1 - sigmoid(z) where it turns left. They sum to 1; d = 0 gives ones [..., 1].
    """
    mixture: Tensor = _differentiable(_leaf_mixture, _functorch.leaf_mixture)(node_logits)
    return mixture


def gated_activation(pre: Tensor, mixture: Tensor, activation: str = "relu") -> Tensor:
    """activation(pre) times the weight of its leaf, saving only its inputs for backward.

    Args:
        pre: [..., L * l], pre-activations of L leaves with l neurons each.
        mixture: [..., L], same dtype.

    Returns:
        [..., L * l]: activation(pre) * mixture, each weight repeated l times.
    """
    gated = _differentiable(_gated_activation, _functorch.gated_activation)
    hidden: Tensor = gated(pre, mixture, activation)
    return hidden


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
    dropout: float = 0.0,
    prune: float = 0.0,
    trees: int = 1,
    node_activation: str = "identity",
    leaf_activation: str = "relu",
) -> SoftTreeOutput:
    """Soft trees, the training form of arXiv 2308.14711: a mixture over all leaves.

    out(node) = c * out(right child) + (1 - c) * out(left child) with c = sigmoid(s) and
    s = <x, node_weight> + node_bias; a node with an output row adds
    node_activation(s) * node_output. It is computed as products over all leaves; the largest tensor
    is [tokens, K * leaves * l].

    Args:
        leak: [..., K, n] bool; where true c becomes 1 - c (region leak).
        dropout: probability in [0, 1] to zero a hidden activation; the others are scaled by
            1 / (1 - dropout). It applies whenever it is not 0.
        prune: in [0, 1]; a leaf whose weight is less than this, and not the largest of its tree,
            is dropped for that token: it adds nothing to the output and gets no gradient, nor does
            its weight. The output then differs from the full mixture by less than ``prune`` times
            the sum over the dropped leaves of |leaf output|. On the CPU a leaf that is dropped
            costs nothing, as soon as half of them are (what is compiled or transformed cannot
            depend on values and takes that for granted); on a GPU, and with dropout, all leaves
            are computed.
        trees: K.

    Returns:
        output [..., out], node_logits [..., K, n] before the leak and mixture [..., K, leaves]
        after it, all of the dtype of x (of autocast's where that is on).
    """
    out = _output_width(x, node_weight, node_bias, node_output, w1, b1, w2, b2, leak, trees)
    check_number("soft_tree", "prune", prune, 0.0, 1.0)
    check_choice("soft_tree", "node_activation", node_activation, _ACTIVATIONS)
    check_choice("soft_tree", "leaf_activation", leaf_activation, _ACTIVATIONS)
    tokens = x.reshape(-1, x.shape[-1])
    nodes = node_weight.shape[0]
    # A leaf that is dropped gives the nodes above it no gradient.
    scores = _functorch.sparse_linear if prune and x.is_cpu else linear
    logits = scores(tokens, node_weight, node_bias)
    node_logits = logits.view(*x.shape[:-1], trees, nodes // trees)
    # sigmoid(-z) = 1 - sigmoid(z): transposing a decision is negating its logit.
    mixture = leaf_mixture(
        node_logits if leak is None else torch.where(leak, -node_logits, node_logits)
    )
    output = None
    products = []
    if w1 is not None and w2 is not None and prune and _pruning_pays(mixture, prune, dropout):
        leaves = _differentiable(_sparse_leaves, _functorch.sparse_leaves)
        by_tree = mixture.view(-1, trees, nodes // trees + 1)
        output = leaves(tokens, by_tree, w1, b1, w2, b2, prune, leaf_activation)
    elif w1 is not None and w2 is not None:
        weights = (prune_mixture(mixture, prune) if prune else mixture).view(-1, nodes + trees)
        pre = linear(tokens, w1.flatten(0, 1), None if b1 is None else b1.flatten())
        hidden = gated_activation(pre, weights, leaf_activation)
        if dropout:
            hidden = F.dropout(hidden, dropout)
        products.append((hidden, w2.flatten(0, 1)))
        if b2 is not None:
            products.append((weights, b2))
    if node_output is not None and nodes:
        reach = node_reach(mixture).view(-1, nodes)
        products.append((gated_activation(logits, reach, node_activation), node_output))
    for a, b in products:
        product = linear(a, b.T)
        output = product if output is None else output + product
    assert output is not None
    return SoftTreeOutput(output.view(*x.shape[:-1], out), node_logits, mixture)


# Share of the leaves that tokens keep up to which skipping the others pays: a leaf that is kept
# takes longer by itself than as a part of one large product.
_SPARSE_SHARE = 0.5


def _pruning_pays(mixture: Tensor, prune: float, dropout: float) -> bool:
    """Whether the leaves that stay are worth being computed one by one.

    What is compiled or transformed cannot depend on values, and takes this for granted.
    """
    if dropout or mixture.device.type != "cpu":
        return False
    if _transforms_active() or torch.compiler.is_compiling():
        return True
    return int(torch.count_nonzero(mixture >= prune)) <= _SPARSE_SHARE * mixture.numel()


def bernoulli_entropy(node_logits: Tensor) -> Tensor:
    """Entropy in nats of each decision, -c ln c - (1 - c) ln(1 - c), c = sigmoid(z); elementwise.

    c and 1 - c are clamped to [1e-6, 1 - 1e-6] as in the published package: a decision harder than
    that has no gradient.
    """
    bounds = (1e-6, 1 - 1e-6)
    right = torch.sigmoid(node_logits).clamp(*bounds)
    left = torch.sigmoid(-node_logits).clamp(*bounds)
    entropy: Tensor = torch.special.entr(right) + torch.special.entr(left)
    return entropy


def _output_width(
    x: Tensor,
    node_weight: Tensor,
    node_bias: Tensor | None,
    node_output: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    leak: Tensor | None,
    trees: int,
) -> int:
    """Check the tensors of :func:`soft_tree`; the output width that they agree on."""
    if not x.is_floating_point():
        reject("soft_tree", "x", "a floating-point dtype", x.dtype)
    if trees < 1:
        reject("soft_tree", "trees", "an integer >= 1", trees)
    rows = node_weight.shape[0] if node_weight.dim() == 2 else -1
    nodes = rows // trees
    if rows != nodes * trees or nodes & (nodes + 1):
        expected = "shape [trees * (2^levels - 1), in]"
        reject("soft_tree", "node_weight", expected, list(node_weight.shape))
    width = node_weight.shape[1]
    if x.dim() == 0 or x.shape[-1] != width:
        reject("soft_tree", "x", f"shape [..., {width}]", list(x.shape))
    if (w1 is None) != (w2 is None) or (w1 is None and (b1 is not None or b2 is not None)):
        reject("soft_tree", "w1, b1, w2, b2", "w1 and w2, or none of the four", "a part of them")
    rows_out = node_output if w2 is None else w2
    if rows_out is None or rows_out.dim() == 0 or (w2 is None and rows == 0):
        reject("soft_tree", "w1, w2, node_output", "leaf networks or nodes with outputs", "neither")
    out = rows_out.shape[-1]
    leaves = rows + trees
    leaf_width = w1.shape[1] if w1 is not None and w1.dim() == 3 else -1
    for name, tensor, shape in (
        ("node_weight", node_weight, (rows, width)),
        ("node_bias", node_bias, (rows,)),
        ("node_output", node_output, (rows, out)),
        ("w1", w1, (leaves, leaf_width, width)),
        ("b1", b1, (leaves, leaf_width)),
        ("w2", w2, (leaves, leaf_width, out)),
        ("b2", b2, (leaves, out)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            reject("soft_tree", name, f"shape {list(shape)}", list(tensor.shape))
        if tensor.device != x.device:
            reject("soft_tree", name, f"device {x.device}", tensor.device)
        if tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            reject("soft_tree", name, f"dtype {x.dtype}", tensor.dtype)
    if leak is not None:
        shape = (*x.shape[:-1], trees, nodes)
        if leak.dtype != torch.bool or leak.shape != shape:
            reject("soft_tree", "leak", f"bool {list(shape)}", (leak.dtype, list(leak.shape)))
    return out
