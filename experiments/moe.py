"""A mixture of experts, the strongest known way to visit few neurons of many."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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

        order = choices.argsort()
        token = order // self.active
        groups = tokens.index_select(0, token).split(counts.tolist())
        # The gradient of an index is as large as all experts, that of unbind is put together once.
        weights = zip(*(weight.unbind() for weight in self._experts()), strict=True)
        outputs = [
            torch.addmm(b2, F.gelu(F.linear(group, w1, b1)), w2)
            for group, (w1, b1, w2, b2) in zip(groups, weights, strict=True)
        ]
        gated = torch.cat(outputs) * gate.flatten()[order].unsqueeze(1)
        y = gated.new_zeros(len(tokens), gated.shape[1]).index_add(0, token, gated)
        return y.unflatten(0, x.shape[:-1])

    def _experts(self) -> tuple[Tensor, ...]:
        return self.w1, self.b1, self.w2, self.b2


def balance_loss(model: nn.Module) -> Tensor | float:
    """Sum over the mixtures of a model after a training forward; 0 without any."""
    mixtures = [module for module in model.modules() if isinstance(module, Experts)]
    return sum((mixture.balance_loss for mixture in mixtures), 0.0)


def _uniform(fan_in: int, *shape: int) -> nn.Parameter:
    """In +-1 / sqrt(fan-in), as the weights of the other layers."""
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
