"""What the layers share around the tree operators: weights, random decisions, rows on a path."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ._arguments import check_choice, check_count, check_number, reject

STRAIGHT_THROUGH = "straight_through"


def check_routing(
    owner: str,
    routing_gradient: str,
    slope: float,
    noise: float,
    alternates: int | None,
    min_slope: float,
) -> None:
    check_choice(owner, "routing_gradient", routing_gradient, (STRAIGHT_THROUGH, "none"))
    check_number(owner, "slope", slope)
    if not slope > 0:
        reject(owner, "slope", "a number > 0", slope)
    check_number(owner, "noise", noise)
    if alternates is not None:
        check_count(owner, "alternates", alternates)
    check_number(owner, "min_slope", min_slope, 0.0, 1.0)


def tree_weights(layer: nn.Module, names: tuple[str, ...]) -> list[Any]:
    """The layer's parameters of these names."""
    parameters = layer._parameters
    try:  # nn.Module's own attribute access would take a tenth of a one-token inference for each
        return [parameters[name] for name in names]
    except KeyError:  # a parametrised or pruned weight is an attribute but no parameter
        return [getattr(layer, name) for name in names]


def score_dtype(x: Tensor) -> torch.dtype:
    """Dtype of the operator's scores, and of the noise and scales it takes, for tokens ``x``."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def decision_noise(
    x: Tensor, trees: int, levels: int, *, noise: float, slope: float, leak: float = 0.0
) -> Tensor:
    """The operator's ``noise`` [..., K, levels] for decisions [slope * s + noise * logistic >= 0].

    With probability 2 * ``leak`` a decision is random: so it is flipped with probability ``leak``.
    """
    dtype = score_dtype(x)
    shape = (*x.shape[:-1], trees, levels)
    if noise:
        # Products of tensors with the two numbers, so that a compiled step need not be traced anew
        # when a schedule changes them.
        uniform = torch.rand(shape, dtype=dtype, device=x.device)
        offset = noise * torch.logit(uniform, eps=1e-6) / slope
    else:
        offset = torch.zeros(shape, dtype=dtype, device=x.device)
    if leak:
        uniform = torch.rand(shape, dtype=dtype, device=x.device)
        offset = offset.masked_fill(uniform < leak, -math.inf)
        offset = offset.masked_fill(uniform >= 1 - leak, math.inf)
    return offset


def drawn_alternates(
    x: Tensor, trees: int, levels: int, decisions: int, count: int | None
) -> Tensor | None:
    """The operator's ``alternates`` [..., K, levels], None for all.

    Each token has ``count`` of its ``decisions`` in each tree drawn without replacement. They get
    the factor decisions / count, so that the mean over draws is the whole gradient.
    """
    if count is None or count >= decisions:
        return None
    shape = (*x.shape[:-1], trees)
    drawn = torch.rand(*shape, decisions, device=x.device).topk(count, sorted=False).indices
    factors = torch.zeros(*shape, levels, dtype=score_dtype(x), device=x.device)
    return factors.scatter(-1, drawn, decisions / count)


def visited_nodes(leaf: Tensor, levels: int) -> Tensor:
    """Rows [..., K, levels] in the [K * n] node parameters of the path to ``leaf`` [..., K]."""
    level = torch.arange(levels, device=leaf.device)
    tree = torch.arange(leaf.shape[-1], device=leaf.device).unsqueeze(-1)
    ancestor = leaf.unsqueeze(-1) >> (levels - level)
    node: Tensor = tree * (2**levels - 1) + 2**level - 1 + ancestor
    return node
