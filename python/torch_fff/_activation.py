"""Activations as the operators name them."""

from __future__ import annotations

from torch import nn

from ._arguments import reject
from .reference import ACTIVATIONS

_MODULES: dict[type, str] = {nn.ReLU: "relu", nn.SiLU: "silu", nn.Identity: "identity"}
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def activation_name(owner: str, argument: str, activation: nn.Module | str) -> str:
    """The operators' name of an activation module, or of itself.

    Types are compared exactly: a subclass may compute something else.
    """
    if isinstance(activation, str):
        name = activation
    elif type(activation) is nn.GELU:
        name = _GELU[activation.approximate]
    else:
        name = _MODULES.get(type(activation), "")
    if name not in ACTIVATIONS:
        supported = "nn.ReLU(), nn.GELU(), nn.GELU(approximate='tanh'), nn.SiLU(), nn.Identity()"
        names = ", ".join(map(repr, ACTIVATIONS))
        reject(owner, argument, f"{supported} or one of {names}", activation)
    return name
