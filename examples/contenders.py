"""The layers the demo compares, each with its way of training and what one sample costs it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from torch_fff import FFF, UltraFFF
from training import Objective, plain, published, straight_through


@dataclass(frozen=True)
class Contender:
    """`neurons` and `parameters` are what one sample touches in hard inference."""

    name: str
    layer: nn.Module
    objective: Objective
    neurons: int
    neurons_all: int
    parameters: int

    @property
    def parameters_all(self) -> int:
        return sum(parameter.numel() for parameter in self.layer.parameters())


def dense(width_in: int, width: int, width_out: int) -> Contender:
    layer = nn.Sequential(nn.Linear(width_in, width), nn.ReLU(), nn.Linear(width, width_out))
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    return Contender(f"dense {width}", layer, plain, width, width, parameters)


def fff(
    width_in: int, leaf_width: int, width_out: int, depth: int, objective: Objective
) -> Contender:
    """One tree: `depth` nodes decide, one leaf network of `leaf_width` neurons answers."""
    hard = objective is straight_through
    layer = FFF(width_in, leaf_width, width_out, depth, train_hardened=hard)
    neurons = depth + leaf_width
    parameters = neurons * (width_in + 1) + (leaf_width + 1) * width_out
    training = "straight-through" if hard else "published"
    name = f"FFF l={leaf_width} d={depth} {training}"
    total = layer.n_nodes + layer.n_leaves * leaf_width
    return Contender(name, layer, objective, neurons, total, parameters)


def ultra_fff(width_in: int, width_out: int, depth: int, trees: int) -> Contender:
    """`trees` trees of neurons; the depth + 1 neurons on the path through each tree answer."""
    layer = UltraFFF(
        width_in, width_out, depth, parallel_size=trees, routing_gradient="straight_through"
    )
    neurons = trees * (depth + 1)
    total = trees * (2 ** (depth + 1) - 1)
    parameters = neurons * (width_in + 1 + width_out)
    name = f"UltraFFF {trees}x{depth} straight-through"
    return Contender(name, layer, plain, neurons, total, parameters)


def all_contenders(width_in: int, width_out: int) -> list[Contender]:
    """Dense layers of the FFF's training width and of both trees' inference widths, then trees."""
    return [
        dense(width_in, 128, width_out),
        dense(width_in, 32, width_out),
        dense(width_in, 12, width_out),
        fff(width_in, 8, width_out, 4, published),
        fff(width_in, 8, width_out, 4, straight_through),
        ultra_fff(width_in, width_out, depth=7, trees=4),
    ]
