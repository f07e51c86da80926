"""A mixture of experts, top 1: a linear gate chooses one of the leaves' like for every token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_fff import FFF

from ..case import Case
from ..layers import Layer, activation


class Experts(nn.Module):
    """Tokens are grouped by expert; a loop over the experts that have any computes each group.

    w1 [experts, l, in], b1 [experts, l], w2 [experts, l, out], b2 [experts, out]
    """

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor

    def __init__(self, gate: nn.Linear, weights: tuple[Tensor, ...], act: nn.Module) -> None:
        super().__init__()
        self.gate = gate
        self.w1, self.b1, self.w2, self.b2 = weights
        self.activation = act

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        best, expert = logits.max(1)
        share = torch.exp(best - logits.logsumexp(1))
        order = expert.argsort()
        experts, counts = torch.unique_consecutive(expert[order], return_counts=True)
        groups = x[order].split(counts.tolist())
        w1, b1, w2, b2 = self._experts()
        outputs = [
            torch.addmm(b2[e], self.activation(F.linear(tokens, w1[e], b1[e])), w2[e])
            for e, tokens in zip(experts.tolist(), groups, strict=True)
        ]
        grouped = torch.cat(outputs) * share[order].unsqueeze(1)
        return torch.empty_like(grouped).index_copy(0, order, grouped)

    def _experts(self) -> Sequence[Tensor | tuple[Tensor, ...]]:
        weights = [self.w1, self.b1, self.w2, self.b2]
        if not torch.is_grad_enabled():
            return weights
        # The gradient of an index is as large as all experts, that of unbind is put together once.
        return [weight.unbind() for weight in weights]


class GroupedExperts(Experts):
    """The groups as one product: nothing has to know their sizes beforehand."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        best, expert = logits.max(1)
        share = torch.exp(best - logits.logsumexp(1))
        expert, order = expert.sort()
        first = torch.arange(1, len(self.w1) + 1, device=x.device)
        ends = torch.searchsorted(expert, first).int()  # where the groups end
        hidden = torch._grouped_mm(x[order], self.w1.transpose(1, 2), offs=ends)
        hidden = self.activation(hidden + self.b1[expert])
        outputs = torch._grouped_mm(hidden, self.w2, offs=ends) + self.b2[expert]
        grouped = outputs * share[order].unsqueeze(1)
        return torch.empty_like(grouped).index_copy(0, order, grouped)


def build(case: Case, layer: Layer, x: Tensor) -> nn.Module:
    """The experts are the layer's own leaf weights, to spare memory.

    On a GPU bfloat16 has a grouped product, for fewer than 1024 groups.
    """
    torch.manual_seed(0)
    gate = nn.Linear(case.input_width, case.leaves, dtype=case.torch_dtype)
    bound = 1 / math.sqrt(case.input_width)
    nn.init.uniform_(gate.weight, -bound, bound)
    assert isinstance(layer, FFF)
    grouped = case.device == "cuda" and case.dtype == "bfloat16" and case.leaves < 1024
    kind = GroupedExperts if grouped else Experts
    return kind(gate, (layer.w1, layer.b1, layer.w2, layer.b2), activation(case))


def needs(case: Case) -> int:
    gate = (case.input_width + 2 * case.tokens) * case.leaves
    hidden = case.tokens * (case.leaf_width + case.input_width + case.output_width)
    return 3 * (gate + hidden) * case.itemsize


def unfit(case: Case) -> str:
    if not case.leaf_width:
        return "trees of neurons have no leaves to make experts of"
    return "" if case.trees == 1 else "one tree's leaves make one set of experts"
