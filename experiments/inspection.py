"""What a trained tree does with a set of inputs."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn.functional import linear

from torch_fff import FFF, UltraFFF, functional
from torch_fff.reference import ACTIVATIONS


@torch.inference_mode()
def leaves_used(layer: FFF | UltraFFF, x: Tensor) -> tuple[int, int]:
    """(leaves, or last neurons, that some token reaches; how many there are), over all trees."""
    fff = isinstance(layer, FFF)
    nodes = layer.node_weights, layer.node_biases
    _, leaf = functional.descend(x, *nodes, trees=layer.parallel_size, tie_right=fff)
    leaf = leaf if fff else leaf // 2
    used = sum(len(tree.unique()) for tree in leaf.unbind(-1))
    return used, layer.parallel_size * 2**layer.depth


@torch.inference_mode()
def mean_entropy(layer: FFF | UltraFFF, x: Tensor) -> float:
    """Mean over tokens and deciding nodes at the layer's slope, in nats; at most ln 2 = 0.69."""
    deciding = _scores(layer, x)[..., : 2**layer.depth - 1]
    if not deciding.numel():
        return 0.0
    return functional.bernoulli_entropy(layer.slope * deciding).mean().item()


@torch.inference_mode()
def soft_output(layer: FFF | UltraFFF, x: Tensor) -> Tensor:
    """The output when every decision is its sigmoid at the layer's slope."""
    if isinstance(layer, UltraFFF):
        scores = _scores(layer, x)
        reach = functional.node_reach(functional.leaf_mixture(layer.slope * scores))
        return (ACTIVATIONS[layer.activation](scores) * reach).flatten(-2) @ layer.node_outputs
    if layer.slope == 1:
        return layer.eval()(x, use_hard_decisions=False)
    # A slope scales the nodes' scores; their outputs, identity or ReLU, scale with them.
    assert layer.node_outputs is None or layer.node_activation in ("identity", "relu")
    scaled = copy.copy(layer)
    scaled._parameters = dict(layer._parameters)
    scaled.node_weights = torch.nn.Parameter(layer.slope * layer.node_weights)
    scaled.node_biases = torch.nn.Parameter(layer.slope * layer.node_biases)
    if layer.node_outputs is not None:
        scaled.node_outputs = torch.nn.Parameter(layer.node_outputs / layer.slope)
    return scaled.eval()(x, use_hard_decisions=False)


def _scores(layer: FFF | UltraFFF, x: Tensor) -> Tensor:
    """[tokens, trees, nodes]"""
    scores = linear(x, layer.node_weights, layer.node_biases)
    return scores.view(len(x), layer.parallel_size, -1)
