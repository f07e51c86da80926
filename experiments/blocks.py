"""The feedforward blocks that the language models differ in, as settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_fff import FFF, UltraFFF

from .balanced import BalancedTree
from .gated import GatedTree
from .moe import Experts


@dataclass(frozen=True)
class DenseBlock:
    neurons: int

    @property
    def visited(self) -> int:
        return self.neurons

    def build(self, width: int) -> nn.Module:
        return Dense(width, self.neurons)


@dataclass(frozen=True)
class TreeBlock:
    """layer: "FFF", "BalancedTree", "UltraFFF" or "GatedTree". options: of it, but widths and
    activation.
    """

    layer: str
    options: dict[str, Any]

    @property
    def neurons(self) -> int:
        """Neurons that have an output row."""
        built = self._on_meta()
        nodes = built.node_outputs is not None and len(built.node_outputs)
        return nodes + (built.b1.numel() if isinstance(built, FFF) else 0)

    @property
    def visited(self) -> int:
        """Neurons that a token touches, nodes that only decide included."""
        built = self._on_meta()
        each = built.leaf_width if isinstance(built, FFF) else 1
        return built.parallel_size * (built.depth + each)

    def build(self, width: int) -> FFF | UltraFFF:
        if self.layer == "UltraFFF":
            return UltraFFF(width, width, activation="gelu", **self.options)
        if self.layer == "GatedTree":
            return GatedTree(width, output_width=width, activation="gelu", **self.options)
        kind = {"FFF": FFF, "BalancedTree": BalancedTree}[self.layer]
        options = {"activation": "gelu", "train_hardened": True, **self.options}
        return kind(width, output_width=width, **options)

    def _on_meta(self) -> FFF | UltraFFF:
        with torch.device("meta"):
            return self.build(1)


@dataclass(frozen=True)
class ExpertsBlock:
    """``experts`` of ``each`` neurons, of which a token visits ``active``."""

    experts: int
    each: int
    active: int

    @property
    def neurons(self) -> int:
        return self.experts * self.each

    @property
    def visited(self) -> int:
        """The router's rows, which only decide, included."""
        return self.experts + self.active * self.each

    def build(self, width: int) -> nn.Module:
        return Experts(width, self.each, width, self.experts, self.active)


Block = DenseBlock | TreeBlock | ExpertsBlock


class Dense(nn.Module):
    """Linear, GELU, Linear by the faster of torch's libraries, so that no slow one flatters trees.

    [..., width] -> [..., width]
    """

    def __init__(self, width: int, neurons: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, neurons), nn.Linear(neurons, width)

    def forward(self, x: Tensor) -> Tensor:
        product = torch.ops.fff.linear
        hidden = F.gelu(product(x.flatten(0, -2), self.first.weight, self.first.bias))
        y: Tensor = product(hidden, self.second.weight, self.second.bias)
        return y.unflatten(0, x.shape[:-1])


def put_into(model: nn.Module, block: Block) -> None:
    """Gives each transformer layer of ``model`` a block of its own for its feedforward part."""
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            layer.linear1 = block.build(layer.linear1.in_features)
            layer.activation, layer.linear2 = nn.Identity(), nn.Identity()
            layer.activation_relu_or_gelu = 0  # no fused kernel, which would want weights
