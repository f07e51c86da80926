"""What a baseline is to the runner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from ..case import Case
from ..layers import Layer


def always_fits(case: Case) -> str:
    return ""


@dataclass(frozen=True)
class Baseline:
    """build(case, layer, x): a module to measure beside ``layer``, for inputs such as ``x``.

    needs(case): bytes it takes beside the layer, an estimate that protects from running out.
    unfit(case): why it cannot be built for the case, or "".
    same_function: whether it computes the layer's own output, which is then asserted.
    """

    summary: str
    build: Callable[[Case, Layer, Tensor], nn.Module]
    needs: Callable[[Case], int]
    unfit: Callable[[Case], str] = always_fits
    same_function: bool = False
