"""All neurons, and a mask over those that hard routing does not visit: UltraFastBERT as shipped."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_fff.reference import ACTIVATIONS

from ..case import NONE, TRAINING, Case
from ..layers import Layer


class MaskedTree(nn.Module):
    """Shares the weights of a layer."""

    layer: Any

    def __init__(self, case: Case, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        self.case = case
        self.outputs_in_rows = case.leaf_width == 0

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        scores = F.linear(x, layer.node_weights, layer.node_biases)
        scores = scores.view(len(x), self.case.trees, -1)
        visited, end = self._follow(scores.detach())
        act = ACTIVATIONS[layer.activation]
        if self.outputs_in_rows:
            return torch.mm((act(scores) * visited).flatten(1), layer.node_outputs)
        pre = F.linear(x, layer.w1.flatten(0, 1), layer.b1.flatten())
        reached = torch.zeros(*end.shape[:-1], 2**self.case.depth, dtype=x.dtype)
        reached = reached.scatter(-1, end, 1).flatten(1)
        hidden = act(pre).view(len(x), -1, self.case.leaf_width) * reached.unsqueeze(-1)
        output = torch.mm(reached, layer.b2)
        return torch.addmm(output, hidden.flatten(1), layer.w2.flatten(0, 1))

    def _follow(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The mask over nodes, and the position [tokens, K, 1] where the path ends."""
        mask = torch.zeros_like(scores)
        node = torch.zeros(*scores.shape[:-1], 1, dtype=torch.int64)
        for _ in range(self.case.levels):
            mask.scatter_(-1, node, 1)
            score = scores.gather(-1, node)
            right = score > 0 if self.outputs_in_rows else score >= 0
            node = 2 * node + 1 + right
        return mask, node - scores.shape[-1]


def build(case: Case, layer: Layer, x: Tensor) -> nn.Module:
    return MaskedTree(case, layer)


def needs(case: Case) -> int:
    return 6 * case.tokens * case.neurons * case.itemsize


def unfit(case: Case) -> str:
    if case.step == TRAINING and case.routing != NONE:
        return "a mask gives routing no gradient"
    if case.dtype != "float32":
        return f"its scores would be rounded to {case.dtype}, and other paths taken"
    return ""
