"""Regression of a layer with hard paths onto cached outputs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .fff import FFF

_BATCH = 1024


def distil(
    layer: FFF,
    x: Tensor,
    y: Tensor,
    importance: Tensor,
    *,
    steps: int,
    learning_rate: float,
    generator: torch.Generator,
    on_step: Callable[[int, float], None],
) -> None:
    """Train the leaves of ``layer`` for x [tokens, in] -> y [tokens, out], routing as it is.

    The loss is the squared error, weighted with ``importance`` [out]. ``on_step`` is told the steps
    done and their last loss.
    """
    batch = min(_BATCH, len(x))
    leaves = (layer.w1, layer.b1, layer.w2, layer.b2)
    optimizer = torch.optim.AdamW(leaves, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _warm_cosine(step / max(steps, 1))
    )
    for parameter in layer.parameters():
        parameter.requires_grad_(any(parameter is leaf for leaf in leaves))
    order = torch.empty(0, dtype=torch.int64)
    with torch.enable_grad():
        for step in range(steps):
            if len(order) < batch:
                order = torch.randperm(len(x), generator=generator)
            rows, order = order[:batch].to(x.device), order[batch:]
            loss = ((layer(x[rows]) - y[rows]).square() * importance).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            on_step(step + 1, loss.item())
    for parameter in layer.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None


def _warm_cosine(done: float) -> float:
    return min(1.0, done / 0.05 + 0.1) * 0.5 * (1 + math.cos(math.pi * done))
