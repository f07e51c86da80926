"""A tree as batched matrix products over gathered rows, level by level."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_fff.reference import ACTIVATIONS

from ..case import NONE, TRAINING, Case
from ..layers import Layer


class BatchedTree(nn.Module):
    """Shares the weights of a layer."""

    layer: Any
    first_node: Tensor
    first_leaf: Tensor

    def __init__(self, case: Case, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        self.case = case
        self.first_node = torch.arange(case.trees) * (2**case.levels - 1)
        self.first_leaf = torch.arange(case.trees) * 2**case.depth

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        act = ACTIVATIONS[layer.activation]
        neurons = self.case.leaf_width == 0
        output: Tensor = x.new_zeros(len(x), 1, self.case.output_width)
        column = x.unsqueeze(-1)  # [tokens, in, 1]
        node = torch.zeros(len(x), self.case.trees, dtype=torch.int64)
        for _ in range(self.case.levels):
            row = node + self.first_node
            # F.embedding gathers rows and has the fastest backward of all that do.
            scores = torch.bmm(F.embedding(row, layer.node_weights), column).squeeze(-1)
            scores = scores + layer.node_biases[row]
            if neurons:
                rows = F.embedding(row, layer.node_outputs)
                output = torch.baddbmm(output, act(scores).unsqueeze(1), rows)
            node = 2 * node + 1 + (scores > 0 if neurons else scores >= 0)
        if not neurons:
            leaf = (node - (2**self.case.depth - 1) + self.first_leaf).flatten()
            output = output + self._leaves(column, leaf, act)
        return output.squeeze(1)

    def _leaves(self, column: Tensor, leaf: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        layer = self.layer
        tokens, width = len(column), self.case.trees * self.case.leaf_width

        def gather(weight: Tensor) -> Tensor:  # [leaves, l, n] -> [tokens, K * l, n]
            return F.embedding(leaf, weight.flatten(1)).view(tokens, width, -1)

        hidden = act(torch.bmm(gather(layer.w1), column) + gather(layer.b1.unsqueeze(-1)))
        bias = layer.b2[leaf].view(tokens, self.case.trees, -1).sum(1, keepdim=True)
        return torch.baddbmm(bias, hidden.transpose(1, 2), gather(layer.w2))


def build(case: Case, layer: Layer, x: Tensor) -> nn.Module:
    return BatchedTree(case, layer)


def needs(case: Case) -> int:
    rows = case.trees * max(case.leaf_width, 1)
    if case.step == TRAINING:
        rows = case.visited
    return 3 * case.tokens * rows * (case.input_width + case.output_width) * case.itemsize


def unfit(case: Case) -> str:
    if case.step == TRAINING and case.routing != NONE:
        return "a gathered path gives routing no gradient"
    if case.dtype != "float32":
        return f"its scores would be rounded to {case.dtype}, and other paths taken"
    return ""
