"""What one would try before trees on a dense block: modules with a fraction of its multiplies."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_fff._blocks import Block


class Pruned(nn.Module):
    """The neurons with the largest product of norms |w_in| |w_out|."""

    def __init__(self, block: Block, fraction: float) -> None:
        super().__init__()
        norms = block.linear_in.norm(dim=1) * block.linear_out.norm(dim=0)
        kept = norms.topk(int(fraction * block.intermediate_width)).indices
        self.block = block
        self.w1, self.b1 = block.linear_in[kept], block.bias_in[kept]
        self.w2, self.b2 = block.linear_out[:, kept], block.bias_out

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.block.activation_function(F.linear(x, self.w1, self.b1))
        return F.linear(hidden, self.w2, self.b2)


class LowRank(nn.Module):
    """Both matrices by their largest singular values, at a rank for the multiplies."""

    def __init__(self, block: Block, fraction: float) -> None:
        super().__init__()
        hidden, width = block.linear_in.shape
        rank = int(fraction * hidden * width / (hidden + width))
        self.block = block
        self.factors = [_factors(w, rank) for w in (block.linear_in, block.linear_out)]

    def forward(self, x: Tensor) -> Tensor:
        (down_in, up_in), (down_out, up_out) = self.factors
        hidden = F.linear(F.linear(x, down_in), up_in, self.block.bias_in)
        hidden = self.block.activation_function(hidden)
        return F.linear(F.linear(hidden, down_out), up_out, self.block.bias_out)


class OracleTopK(nn.Module):
    """For each token the neurons with the largest |activation| |w_out|, known without a cost.

    All neurons are computed to find them; what is counted is what a perfect predictor would leave.
    """

    def __init__(self, block: Block, fraction: float) -> None:
        super().__init__()
        self.block = block
        self.kept = int(fraction * block.intermediate_width)
        self.norms = block.linear_out.norm(dim=0)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.block.linear_in, self.block.bias_in)
        hidden = self.block.activation_function(hidden)
        kept = (hidden.abs() * self.norms).topk(self.kept, dim=-1).indices
        mask = torch.zeros_like(hidden).scatter(-1, kept, 1.0)
        return F.linear(hidden * mask, self.block.linear_out, self.block.bias_out)


def _factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """weight [a, b] ~ up [a, rank] @ down [rank, b], as (down, up)."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    return v[:rank], u[:, :rank] * s[:rank]
