"""Weights that are a shared base plus their own differences: folding, checkpoints of either kind.

``bases`` maps the names of a layer's own weights to those of their bases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._arguments import reject


@torch.no_grad()
def move_base(
    owner: str, layer: nn.Module, bases: Mapping[str, str], sums: Sequence[Tensor | None]
) -> None:
    """Give the layer's own weights the values ``sums``, in their order, and the base zeros.

    Raises:
        ValueError: a weight is parametrised or pruned (``torch.nn.utils``).
    """
    for name in (*bases, *bases.values()):
        if name not in layer._parameters:
            reject(owner, name, "a parameter", "a parametrised or pruned weight")
    for (own, base), value in zip(bases.items(), sums, strict=True):
        if value is not None:
            getattr(layer, own).copy_(value)
            getattr(layer, base).zero_()


def fold_base(
    owner: str, layer: nn.Module, bases: Mapping[str, str], sums: Sequence[Tensor | None]
) -> None:
    """As :func:`move_base`, and the base's parameters become None."""
    move_base(owner, layer, bases, sums)
    for base in bases.values():
        setattr(layer, base, None)


def check_base(
    owner: str,
    argument: str,
    present: bool,
    bases: Mapping[str, str],
    state: dict[str, Any],
    prefix: str,
) -> list[str]:
    """Errors for a checkpoint of the other kind, whose base is taken out of ``state``.

    present: whether the layer has a base, that is, its ``argument``.
    """
    own, base = (prefix + name for name in next(iter(bases.items())))
    if base in state and not present:
        for name in bases.values():
            state.pop(prefix + name, None)
        return [
            f"{owner}: {argument}: expected no base, the checkpoint has one: construct the "
            f"layer with {argument}=True, then fold() it if it is to have none"
        ]
    if present and own in state and base not in state:
        return [
            f"{owner}: {argument}: expected a base, the checkpoint has none: construct the "
            f"layer with {argument}=False, or fold() it first"
        ]
    return []
