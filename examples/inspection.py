"""What a trained tree does with a set of inputs: its decisions, leaves, entropy and soft output."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_fff import FFF, UltraFFF, functional


@torch.inference_mode()
def leaves(layer: FFF | UltraFFF, x: Tensor) -> Tensor:
    """x [tokens, in] -> what each token ends at, [tokens, trees]: a leaf, or a last neuron."""
    fff = isinstance(layer, FFF)
    _, leaf = functional.descend(
        x, layer.node_weights, layer.node_biases, trees=layer.parallel_size, tie_right=fff
    )
    return leaf if fff else leaf // 2


@torch.inference_mode()
def leaves_used(layer: FFF | UltraFFF, x: Tensor) -> tuple[int, int]:
    """(leaves that some token reaches, leaves there are), over all trees."""
    used = sum(len(tree.unique()) for tree in leaves(layer, x).unbind(-1))
    return used, layer.parallel_size * 2**layer.depth


def node_logits(layer: FFF | UltraFFF, x: Tensor) -> Tensor:
    """[tokens, trees, nodes]"""
    scores = torch.nn.functional.linear(x, layer.node_weights, layer.node_biases)
    return scores.view(len(x), layer.parallel_size, -1)


@torch.inference_mode()
def mean_entropy(layer: FFF | UltraFFF, x: Tensor) -> float:
    """Mean over tokens and deciding nodes, in nats; at most ln 2 = 0.69."""
    deciding = 2**layer.depth - 1
    logits = node_logits(layer, x)[..., :deciding]
    return functional.bernoulli_entropy(layer.slope * logits).mean().item()


@torch.inference_mode()
def soft_output(layer: FFF | UltraFFF, x: Tensor) -> Tensor:
    """The output when every decision is its sigmoid, at the slope that training ended with."""
    if isinstance(layer, UltraFFF):  # trained at slope 1
        return functional.soft_tree(
            x,
            layer.node_weights,
            layer.node_biases,
            layer.node_outputs,
            trees=layer.parallel_size,
            node_activation=layer.activation,
        ).output
    # The FFF's nodes decide and do nothing else, so that a slope is a scale of their weights.
    return functional.soft_tree(
        x,
        layer.slope * layer.node_weights,
        layer.slope * layer.node_biases,
        w1=layer.w1,
        b1=layer.b1,
        w2=layer.w2,
        b2=layer.b2,
        leaf_activation=layer.activation,
    ).output
