"""What one would try before trees on a dense block: modules with a fraction of its multiplies."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]


class Pruned(nn.Module):
    """The neurons with the largest product of norms |w_in| |w_out|."""

    def __init__(
        self, first: nn.Linear, activation: Activation, last: nn.Linear, fraction: float
    ) -> None:
        super().__init__()
        norms = first.weight.norm(dim=1) * last.weight.norm(dim=0)
        kept = norms.topk(int(fraction * first.out_features)).indices
        self.activation = activation
        self.w1, self.b1 = first.weight[kept], first.bias[kept]
        self.w2, self.b2 = last.weight[:, kept], last.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.activation(F.linear(x, self.w1, self.b1)), self.w2, self.b2)


class LowRank(nn.Module):
    """Both matrices by their largest singular values, at the rank that the multiplies allow."""

    def __init__(
        self, first: nn.Linear, activation: Activation, last: nn.Linear, fraction: float
    ) -> None:
        super().__init__()
        hidden, width = first.weight.shape
        rank = int(fraction * hidden * width / (hidden + width))
        self.activation = activation
        self.first = nn.Sequential(*_factors(first, rank))
        self.last = nn.Sequential(*_factors(last, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self.first(x)))


class OracleTopK(nn.Module):
    """For each token the neurons with the largest |activation| |w_out|, known without a cost.

    All neurons are computed to find them; what is counted is what a perfect predictor would leave.
    """

    def __init__(
        self, first: nn.Linear, activation: Activation, last: nn.Linear, fraction: float
    ) -> None:
        super().__init__()
        self.first, self.activation, self.last = first, activation, last
        self.kept = int(fraction * first.out_features)
        self.norms = last.weight.norm(dim=0)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.first(x))
        kept = (hidden.abs() * self.norms).topk(self.kept, dim=-1).indices
        return self.last(hidden * torch.zeros_like(hidden).scatter(-1, kept, 1.0))


def _factors(linear: nn.Linear, rank: int) -> tuple[nn.Linear, nn.Linear]:
    """linear(x) ~ up(down(x))"""
    u, s, v = torch.linalg.svd(linear.weight, full_matrices=False)
    down = nn.Linear(linear.in_features, rank, bias=False)
    up = nn.Linear(rank, linear.out_features)
    down.weight.copy_(v[:rank])
    up.weight.copy_(u[:, :rank] * s[:rank])
    up.bias.copy_(linear.bias)
    return down, up
