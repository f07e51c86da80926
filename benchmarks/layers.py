"""The layers under test, and their definition in plain torch to check them against."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torch_fff import FFF, UltraFFF, functional, reference

from .case import SOFT, TRAINING, Case

Layer = UltraFFF | FFF


def activation(case: Case) -> nn.Module:
    return nn.ReLU() if case.leaf_width else nn.GELU()


def build(case: Case, seed: int = 0) -> Layer:
    torch.manual_seed(seed)
    gradient = case.routing.replace("-", "_")
    if not case.leaf_width:
        neurons = UltraFFF(
            case.input_width,
            case.output_width,
            case.depth,
            case.trees,
            routing_gradient=gradient,
            alternates=case.alternates or None,
            row_sparse_grad=case.row_sparse,
            dtype=case.torch_dtype,
        )
        return neurons.train(case.step == TRAINING)
    layer = FFF(
        case.input_width,
        case.leaf_width,
        case.output_width,
        case.depth,
        train_hardened=case.routing != SOFT,
        parallel_size=case.trees,
        routing_gradient="none" if case.routing == SOFT else gradient,
        prune=case.prune,
        dtype=case.torch_dtype,
    )
    # fastfeedforward 0.2.1 forgets the leaves' output bias in evaluation. With zeros its output can
    # be compared with ours, at the same cost for both.
    nn.init.zeros_(layer.b2)
    if case.entropy:
        _sharpen(layer, case.entropy)
    return layer.train(case.step == TRAINING)


@torch.no_grad()
def _sharpen(layer: FFF, entropy: float) -> None:
    """Scale the nodes so that their decisions on normal tokens have this mean entropy."""
    x = torch.randn(256, layer.input_width, dtype=layer.node_weights.dtype)
    scores = nn.functional.linear(x, layer.node_weights, layer.node_biases)
    low, high = 1e-3, 1e6
    for _ in range(50):
        scale = (low * high) ** 0.5
        if functional.bernoulli_entropy(scale * scores).mean() > entropy:
            low = scale
        else:
            high = scale
    layer.node_weights.mul_(scale)
    layer.node_biases.mul_(scale)


def refer(case: Case, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The reference's output, and the scores [tokens, ...] that decide where a token goes.

    No scores for a soft forward, where nothing hangs on the sign of one.
    """
    nodes = (layer.node_weights, layer.node_biases)
    if isinstance(layer, UltraFFF):
        output, scores, _ = reference.tree(
            x,
            *nodes,
            layer.node_outputs,
            trees=case.trees,
            tie_right=False,
            node_activation=layer.activation,
            straight_through=layer.routing_gradient == "straight_through",
        )
        return output, scores[..., :-1]
    leaves = (layer.w1, layer.b1, layer.w2, layer.b2)
    if case.step == TRAINING and case.routing == SOFT:
        soft = reference.soft_tree(
            x,
            *nodes,
            None,
            *leaves,
            prune=case.prune,
            trees=case.trees,
            leaf_activation=layer.activation,
        )
        return soft.output, None
    output, scores, _ = reference.tree(
        x,
        *nodes,
        None,
        *leaves,
        trees=case.trees,
        leaf_activation=layer.activation,
        straight_through=layer.routing_gradient == "straight_through",
    )
    return output, scores
