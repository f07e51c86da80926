"""What a trained tree does with a set of inputs, as the demo's table and picture need it."""

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
def mean_entropy(layer: FFF | UltraFFF, x: Tensor) -> float:
    """Mean over tokens and all deciding nodes, visited or not, in nats; at most ln 2 = 0.69."""
    logits = torch.nn.functional.linear(x, layer.node_weights, layer.node_biases)
    deciding = logits.view(len(x), layer.parallel_size, -1)[..., : 2**layer.depth - 1]
    return functional.bernoulli_entropy(layer.slope * deciding).mean().item()
