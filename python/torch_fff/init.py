"""First weights from data or from a trained dense block, in place, as those of ``torch.nn.init``.

    layer = FFF(784, 8, 10, depth=7)
    median_splits_(layer, x)  # every leaf gets its share of the tokens x

Nothing here is needed: layers are born with the published random weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._arguments import check_choice, check_count, reject
from ._grouping import Dense, error_weights, initialise, principal_axes
from .fff import FFF
from .reference import ACTIVATIONS
from .ultra_fff import UltraFFF

__all__ = ["from_dense_", "median_splits_"]


@torch.no_grad()
def median_splits_(
    layer: FFF | UltraFFF,
    x: Tensor,
    *,
    direction: str = "drawn",
    fewest: int = 16,
    generator: torch.Generator | None = None,
) -> FFF | UltraFFF:
    """Set the decisions so that each node sends half of its tokens either way.

    Level by level, a node's bias puts its hyperplane halfway between the two middle tokens of those
    that reach it. Where many are alike, it takes the cut between unlike ones that is nearest to the
    middle. Nodes with fewer than ``fewest`` tokens, or with tokens that are all alike, stay as they
    are, and so do the last neurons of an :class:`UltraFFF`, which decide nothing. A shared level
    base moves into the nodes and becomes zero.

    Args:
        layer: with K trees.
        x: tokens [..., in], of the layer's dtype and device, such as one large batch.
        direction: "drawn" keeps the nodes' weights. "principal" turns them, at their length, to the
            principal axis of the tokens that arrive; in tree k (from 0) to the k-th such axis, so
            that trees differ.
        fewest: >= 2.
        generator: of the start of the search for the axes, whose sign depends on it.

    Returns:
        ``layer``.

    Raises:
        ValueError: an argument is wrong; the layer has no biases; ``x`` is not finite.
    """
    owner = "median_splits_"
    tokens = _tokens(owner, layer, x)
    check_choice(owner, "direction", direction, ("drawn", "principal"))
    check_count(owner, "fewest", fewest, minimum=2)
    trees = layer.parallel_size
    if direction == "principal" and trees > layer.input_width:
        reject(owner, "direction", "'drawn' for more trees than dimensions", direction)
    if layer.node_biases is None:
        reject(owner, "layer", "one with biases", "UltraFFF(bias=False)")
    if isinstance(layer, UltraFFF):
        layer._move_base(owner)
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    for tree in range(trees):
        regions = [torch.arange(len(tokens), device=tokens.device)]
        for node in range(2**layer.depth - 1):  # heap order: children are appended in place
            row = tree * layer.n_nodes + node
            here = wide[regions[node]]
            if direction == "principal" and len(here) >= fewest:
                axis = principal_axes(here - here.mean(0), tree + 1, generator)[:, tree]
                layer.node_weights[row] = axis * layer.node_weights[row].to(axis).norm()
            score = here @ layer.node_weights[row].to(here)
            if len(here) >= fewest and (cut := _middle_cut(score)) is not None:
                layer.node_biases[row] = -cut
            right = score + layer.node_biases[row].to(score) >= 0
            regions += [regions[node][~right], regions[node][right]]
    return layer


def _middle_cut(score: Tensor) -> Tensor | None:
    """A number between two unlike scores that parts them as evenly as can be; None if all agree."""
    ordered = score.sort().values
    low, high = ordered[:-1], ordered[1:]
    cuts = (low + high) / 2
    # Of neighbours that no number lies between, none is a cut.
    possible = ((low < cuts) & (cuts < high)).nonzero().flatten()
    if not len(possible):
        return None
    nearest = (2 * (possible + 1) - len(score)).abs().argmin()
    return cuts[possible[nearest]]


@torch.no_grad()
def from_dense_(
    layer: FFF | UltraFFF,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    x: Tensor,
    *,
    generator: torch.Generator | None = None,
) -> FFF | UltraFFF:
    """Start from a trained dense block, x -> act(x w1^T + b1) w2^T + b2, act that of ``layer``.

    An :class:`FFF` gets what :func:`torch_fff.convert` starts from: the neurons are dealt to the
    trees, nodes split tokens by what the neurons say to them, and a leaf holds copies of those that
    vary most over its tokens, with the others' part approximated from these. Node outputs and a
    shared leaf base become zero.

    The nodes of an :class:`UltraFFF` become the block's neurons, each in one node. The neurons are
    dealt to the trees by their size over ``x``. In heap order a node takes, of its tree's, the one
    with the largest squares act^2 |w2|^2 over the tokens that reach it, times 4 p (1 - p), p being
    the share of them that it sends right: what is large but does not split comes last. A shared
    level base becomes zero. An output bias makes the mean output that of the block; without one
    ``b2`` is lost.

    It is a start for training: a token visits a small part of the neurons, and the output is close
    to the block's only as far as those suffice.

    Args:
        layer: of the block's input and output width.
        w1, b1, w2, b2: [hidden, in], [hidden], [out, hidden], [out], as in ``nn.Linear``; b1 and b2
            may be None.
        x: tokens [..., in] as the block gets them, at least a few dozen per leaf.
        generator: of the first guess of the splits.

    Returns:
        ``layer``.

    Raises:
        ValueError: an argument is wrong; the layer is wider than the block: an UltraFFF of more
            nodes than there are neurons, an FFF of more trees; it has a master leaf, which is dense
            itself, or lacks the biases that the block has.
    """
    owner = "from_dense_"
    tokens = _tokens(owner, layer, x)
    if not len(tokens):
        reject(owner, "x", "at least one token", tuple(x.shape))
    dense = _dense(owner, layer, w1, b1, w2, b2, tokens)
    hidden = len(dense.w1)
    wide = tokens.to(dense.w1.dtype)
    if isinstance(layer, FFF):
        if layer.master_leaf_width:
            reject(owner, "layer", "master_leaf_width=0", layer.master_leaf_width)
        if layer.parallel_size > hidden:
            reject(owner, "layer", f"parallel_size <= {hidden} neurons", layer.parallel_size)
        initialise(layer, dense, wide, error_weights(dense(wide)), generator)
        for name, parameter in layer.named_parameters():
            if name.startswith(("node_outputs", "base_")):
                parameter.zero_()
        return layer
    if layer.parallel_size * layer.n_nodes > hidden:
        nodes = layer.parallel_size * layer.n_nodes
        reject(owner, "layer", f"at most {hidden} nodes, as many as neurons", nodes)
    if layer.node_biases is None and dense.b1.any():
        reject(owner, "layer", "UltraFFF(bias=True) for a block with b1", False)
    layer._move_base(owner)
    _neurons_to_nodes(layer, dense, wide)
    if layer.output_bias is not None:
        training = layer.training
        layer.output_bias.zero_()
        output = layer.eval()(tokens)
        layer.train(training)
        layer.output_bias.copy_((dense(wide) - output).mean(0))
    return layer


def _neurons_to_nodes(layer: UltraFFF, dense: Dense, x: Tensor) -> None:
    pre = F.linear(x, dense.w1, dense.b1)
    size = ACTIVATIONS[dense.activation](pre).square() * dense.w2.square().sum(1)
    ranked = size.sum(0).argsort(descending=True)
    trees, n_nodes = layer.parallel_size, layer.n_nodes
    for tree in range(trees):
        free = ranked[tree::trees]
        regions = [torch.arange(len(x), device=x.device)]
        for node in range(n_nodes):
            here = regions[node]
            right = pre[here][:, free] > 0
            usefulness = size[here][:, free].sum(0)
            if node < n_nodes // 2:  # it decides
                share = right.to(x).mean(0)
                usefulness = usefulness * 4 * share * (1 - share)
            best = int(usefulness.nan_to_num().argmax())
            neuron, row = free[best], tree * n_nodes + node
            layer.node_weights[row] = dense.w1[neuron]
            layer.node_outputs[row] = dense.w2[neuron]
            if layer.node_biases is not None:
                layer.node_biases[row] = dense.b1[neuron]
            regions += [here[~right[:, best]], here[right[:, best]]]
            free = torch.cat((free[:best], free[best + 1 :]))


def _tokens(owner: str, layer: nn.Module, x: Tensor) -> Tensor:
    """[tokens, in]"""
    if not isinstance(layer, FFF | UltraFFF):
        reject(owner, "layer", "an FFF or UltraFFF", type(layer).__name__)
    weight = layer.node_weights
    if x.dim() == 0 or x.shape[-1] != layer.input_width:
        reject(owner, "x", f"shape [..., {layer.input_width}]", tuple(x.shape))
    if x.dtype != weight.dtype or x.device != weight.device:
        reject(owner, "x", f"{weight.dtype} on {weight.device}", f"{x.dtype} on {x.device}")
    tokens = x.reshape(-1, x.shape[-1])
    if not tokens.isfinite().all():
        reject(owner, "x", "finite tokens", "infinity or NaN")
    return tokens


def _dense(
    owner: str,
    layer: FFF | UltraFFF,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    x: Tensor,
) -> Dense:
    hidden = len(w1) if w1.dim() else 0
    shapes = {
        "w1": (w1, (hidden, layer.input_width)),
        "b1": (b1, (hidden,)),
        "w2": (w2, (layer.output_width, hidden)),
        "b2": (b2, (layer.output_width,)),
    }
    dtype = torch.promote_types(x.dtype, torch.float32)
    weights = {}
    for name, (weight, shape) in shapes.items():
        if weight is None:
            weight = x.new_zeros(shape)
        if weight.shape != shape:
            reject(owner, name, f"shape {list(shape)}", list(weight.shape))
        if weight.device != x.device:
            reject(owner, name, f"device {x.device}", weight.device)
        weights[name] = weight.detach().to(dtype)
    if not hidden:
        reject(owner, "w1", "at least one neuron", tuple(w1.shape))
    weights["w2"] = weights["w2"].T.contiguous()
    return Dense(**weights, activation=layer.activation)
