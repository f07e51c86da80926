"""The layers that are compared, as settings."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from torch_fff import FFF, UltraFFF


@dataclass(frozen=True)
class Dense:
    """FF: Linear, ReLU, Linear."""

    width: int

    @property
    def name(self) -> str:
        return f"FF w={self.width}"

    @property
    def visited(self) -> int:
        return self.width

    @property
    def neurons(self) -> int:
        return self.width

    def build(self, inputs: int, outputs: int) -> nn.Module:
        hidden = nn.Linear(inputs, self.width), nn.ReLU()
        return nn.Sequential(*hidden, nn.Linear(self.width, outputs))


@dataclass(frozen=True)
class Leaves:
    """FFF: ``trees`` trees of decisions over leaf networks.

    node_output: visited nodes add s * row to the output.
    """

    leaf_width: int
    depth: int
    trees: int = 1
    node_output: bool = False
    master_leaf_width: int = 0
    shared_leaf_base: bool = False

    @property
    def name(self) -> str:
        trees = f"{self.trees}x " if self.trees > 1 else ""
        extra = ", node outputs" if self.node_output else ""
        return f"FFF {trees}l={self.leaf_width} d={self.depth}{extra}"

    @property
    def visited(self) -> int:
        """Neurons that a token touches, nodes that only decide included."""
        return self.trees * (self.depth + self.leaf_width) + self.master_leaf_width

    @property
    def neurons(self) -> int:
        """The training width: neurons that have an output row."""
        nodes = 2**self.depth - 1 if self.node_output else 0
        return self.trees * (nodes + 2**self.depth * self.leaf_width) + self.master_leaf_width

    def build(self, inputs: int, outputs: int) -> FFF:
        return FFF(
            inputs,
            self.leaf_width,
            outputs,
            self.depth,
            parallel_size=self.trees,
            node_output=self.node_output,
            node_activation="identity" if self.node_output else None,
            master_leaf_width=self.master_leaf_width,
            shared_leaf_base=self.shared_leaf_base,
        )


@dataclass(frozen=True)
class Neurons:
    """UltraFFF: ``trees`` trees of neurons."""

    trees: int
    depth: int
    output_bias: bool = True

    @property
    def name(self) -> str:
        return f"UltraFFF {self.trees}x{self.depth}"

    @property
    def visited(self) -> int:
        return self.trees * (self.depth + 1)

    @property
    def neurons(self) -> int:
        return self.trees * (2 ** (self.depth + 1) - 1)

    def build(self, inputs: int, outputs: int) -> UltraFFF:
        return UltraFFF(inputs, outputs, self.depth, self.trees, output_bias=self.output_bias)


Layer = Dense | Leaves | Neurons
