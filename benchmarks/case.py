"""One measurement: a layer, the tokens it gets, and what it is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

FORWARD, TRAINING = "forward", "training"
NONE, STRAIGHT_THROUGH, SOFT = "none", "straight-through", "soft"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# "tf32" is float32 whose products may round their factors.
GPU_DTYPES = {"bfloat16": torch.bfloat16, "tf32": torch.float32, "float32": torch.float32}
_SHORT = {"float32": "fp32", "bfloat16": "bf16", "tf32": "tf32"}
# Widths for which the matrix products of a GPU are fast are multiples of this.
_GPU_WIDTHS = 64


@dataclass(frozen=True)
class Case:
    """UltraFFF (trees of neurons, GELU) if ``leaf_width`` is 0, else FFF (leaf networks, ReLU).

    step: "forward" (inference mode, hard routing) or "training" (forward, and backward to the
        input and all weights).
    routing: in training, the gradient of the routing: "none", "straight-through" or "soft".
    alternates: in straight-through training, branches not taken that are drawn per token and tree;
        0 evaluates all.
    row_sparse: gradients of visited rows alone, as sparse tensors.
    prune: threshold on the leaves' weights in soft training.
    entropy: mean entropy of the nodes' decisions in nats, to which random nodes are sharpened; 0
        leaves them as they are.
    layers: so many layers, each with weights of its own, are called in turn; with 12 the weights
        come from memory or a far cache, as in a whole model.
    dense_width: neurons of the dense baselines; 0 for as many as the trees have, on a GPU rounded
        up to a width that suits it.
    memory: also measure the peak memory of a training step.
    device: "cpu" or "cuda".
    """

    suite: str
    depth: int
    tokens: int
    trees: int = 1
    leaf_width: int = 0
    input_width: int = 768
    output_width: int = 768
    dtype: str = "float32"
    step: str = FORWARD
    routing: str = NONE
    alternates: int = 0
    row_sparse: bool = False
    prune: float = 0.0
    entropy: float = 0.0
    layers: int = 1
    dense_width: int = 0
    memory: bool = False
    device: str = "cpu"
    baselines: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.suite}/" + "-".join(part for part in self._parts().values() if part)

    def series(self, axis: str) -> str:
        """The name without what varies along an axis of a plot: a field or ``neurons``."""
        varying = axis if axis in ("tokens", "entropy") else "geometry"
        return "-".join(part for key, part in self._parts().items() if part and key != varying)

    def _parts(self) -> dict[str, str]:
        widths = (self.input_width, self.output_width)
        return {
            "geometry": self.geometry,
            "widths": "" if widths == (768, 768) else "w{}x{}".format(*widths),
            "dense": f"vs{self.dense_width}" if self.dense_width else "",
            "tokens": f"t{self.tokens}",
            "dtype": _SHORT[self.dtype],
            "prune": f"prune{self.prune:g}" if self.prune else "",
            "entropy": f"entropy{self.entropy:g}" if self.entropy else "",
            "step": "" if self.step == FORWARD else f"training-{self.routing}",
            "alternates": f"alternates{self.alternates}" if self.alternates else "",
            "gradients": "row-sparse" if self.row_sparse else "",
            "layers": f"cold{self.layers}" if self.layers > 1 else "",
        }

    @property
    def geometry(self) -> str:
        if not self.leaf_width:
            return f"{self.trees}x{self.depth}"
        trees = f"{self.trees}x-" if self.trees > 1 else ""
        return f"{trees}l{self.leaf_width}-d{self.depth}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return GPU_DTYPES[self.dtype]

    @property
    def itemsize(self) -> int:
        return self.torch_dtype.itemsize

    @property
    def levels(self) -> int:
        """Levels of nodes of a tree."""
        return self.depth if self.leaf_width else self.depth + 1

    @property
    def leaves(self) -> int:
        """Leaf networks of all trees."""
        return self.trees * (1 << self.depth) if self.leaf_width else 0

    @property
    def neurons(self) -> int:
        """The training width: neurons that have an output row."""
        if self.leaf_width:
            return self.leaves * self.leaf_width
        return self.trees * ((2 << self.depth) - 1)

    @property
    def visited(self) -> int:
        """The inference width: neurons that a token touches, nodes that only decide included."""
        return self.trees * (self.levels + self.leaf_width)

    @property
    def equal_width(self) -> int:
        """Neurons of the dense baselines."""
        if self.dense_width or self.device == "cpu":
            return self.dense_width or self.neurons
        return -(-self.neurons // _GPU_WIDTHS) * _GPU_WIDTHS

    @property
    def weight_bytes(self) -> int:
        """Weights of one layer; biases are small change."""
        nodes = self.trees * ((1 << self.levels) - 1)
        inputs = nodes + self.leaves * self.leaf_width
        return (inputs * self.input_width + self.neurons * self.output_width) * self.itemsize


@dataclass(frozen=True)
class ModelCase:
    """A BERT encoder whose feedforward blocks are trees: ``trees`` of ``depth`` in each layer.

    step: "forward" (inference mode) or "training" (forward, and backward to all weights).
    baselines: names of models.CONTENDERS.
    long: takes minutes, so that a quick run leaves it out.
    device: "cpu".
    """

    suite: str
    batch: int
    sequence: int
    trees: int = 1
    depth: int = 11
    step: str = FORWARD
    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 30522
    long: bool = False
    device: str = "cpu"
    baselines: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        step = "" if self.step == FORWARD else f"-{self.step}"
        return f"{self.suite}/{self.trees}x{self.depth}-b{self.batch}-s{self.sequence}{step}"

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence
