"""The layer itself with all leaves, where it skips the light ones."""

from __future__ import annotations

from copy import deepcopy

from torch import Tensor, nn

from ..case import SOFT, Case
from ..layers import Layer


def build(case: Case, layer: Layer, x: Tensor) -> nn.Module:
    full = deepcopy(layer)
    full.prune = 0.0
    return full


def needs(case: Case) -> int:
    """Weights, their gradients, and hidden activations in three stages."""
    return 2 * case.weight_bytes + 3 * case.tokens * case.neurons * case.itemsize


def unfit(case: Case) -> str:
    return "" if case.routing == SOFT and case.prune else "no leaf is skipped"
