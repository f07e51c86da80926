"""A mixture of experts, the strongest known way to visit few neurons of many."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 32  # tokens of one expert that are computed by one product; fewer are padded


class Experts(nn.Module):
    r"""A linear router sends each token to the ``active`` most probable of ``experts`` networks.

    y = sum over the chosen e of g_e (gelu(x w1_e^T + b1_e) w2_e + b2_e), with p = softmax(x W^T).
    One active expert: g_e = p_e (Switch Transformers, arXiv 2101.03961); several: p_e divided by
    the sum of the chosen ones' p (GShard, arXiv 2006.16668). No token is dropped.

    A training forward leaves ``balance_loss`` = experts * sum over e of f_e P_e (eq. 4 of
    2101.03961): f_e is the share of choices that fell on e (not differentiated), P_e the mean of
    p_e. 1 when balanced, ``experts`` when one expert gets every token of a single choice.

    Parameters: router.weight [E, in], w1 [E, l, in], b1 [E, l], w2 [E, l, out], b2 [E, out].

    Shape: [..., in] -> [..., out].
    """

    def __init__(
        self, inputs: int, neurons: int, outputs: int, experts: int, active: int = 1
    ) -> None:
        super().__init__()
        if not 1 <= active <= experts:
            raise ValueError(f"Experts: active: expected 1 to {experts} (experts), got {active}")
        self.active = active
        self.router = nn.Linear(inputs, experts, bias=False)
        self.w1 = _uniform(inputs, experts, neurons, inputs)
        self.b1 = _uniform(inputs, experts, neurons)
        self.w2 = _uniform(active * neurons, experts, neurons, outputs)
        self.b2 = _uniform(active * neurons, experts, outputs)
        self.balance_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        probability = F.softmax(self.router(tokens), -1)
        gate, chosen = probability.topk(self.active)
        if self.active > 1:
            gate = gate / gate.sum(-1, keepdim=True)
        choices = chosen.flatten()
        counts = torch.bincount(choices, minlength=len(self.w1))
        if self.training:
            shares = counts / max(len(choices), 1)
            self.balance_loss = len(self.w1) * (shares * probability.mean(0)).sum()

        slot, expert = _blocks(choices, counts)
        spread = tokens.repeat_interleave(self.active, 0) if self.active > 1 else tokens
        rows = tokens.new_zeros(len(expert) * BLOCK, tokens.shape[1]).index_copy(0, slot, spread)
        w1, b1, w2, b2 = (weight.index_select(0, expert) for weight in self.experts())
        hidden = F.gelu(torch.baddbmm(b1.unsqueeze(1), rows.view(-1, BLOCK, w1.shape[2]), w1.mT))
        output = torch.baddbmm(b2.unsqueeze(1), hidden, w2).flatten(0, 1).index_select(0, slot)
        y = (gate.unsqueeze(-1) * output.view(-1, self.active, w2.shape[2])).sum(1)
        return y.unflatten(0, x.shape[:-1])

    def experts(self) -> tuple[nn.Parameter, ...]:
        """All of the mixture but its router."""
        return self.w1, self.b1, self.w2, self.b2


def _blocks(choices: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Groups choices by expert into blocks of BLOCK rows, each expert's last one padded.

    choices: [choices] experts; counts: [E] how often each was chosen.

    Returns:
        slot [choices], the row of each; expert [blocks], whose each block is.
    """
    blocks = (counts + BLOCK - 1) // BLOCK
    begin = BLOCK * (blocks.cumsum(0) - blocks)  # row of an expert's first block
    first = counts.cumsum(0) - counts  # place of an expert's first choice in order
    order = choices.argsort()
    of_order = choices[order]
    ranked = begin[of_order] + torch.arange(len(order), device=order.device) - first[of_order]
    slot = torch.empty_like(order).index_copy(0, order, ranked)
    expert = torch.arange(len(counts), device=order.device).repeat_interleave(blocks)
    return slot, expert


def balance_loss(model: nn.Module) -> Tensor | float:
    """Sum over the mixtures of a model after a training forward; 0 without any."""
    mixtures = [module for module in model.modules() if isinstance(module, Experts)]
    return sum((mixture.balance_loss for mixture in mixtures), 0.0)


def _uniform(fan_in: int, *shape: int) -> nn.Parameter:
    """In +-1 / sqrt(fan-in), as the weights of the other layers."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
