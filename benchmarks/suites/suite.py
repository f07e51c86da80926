"""A named group of cases that answers one question."""

from __future__ import annotations

from dataclasses import dataclass

from ..case import Case, ModelCase

DENSE = ("dense-eager", "dense-compiled", "dense-onednn")
GPU_DENSE = ("dense-eager", "dense-cublaslt", "dense-compiled")
NARROW = ("narrow-eager", "narrow-onednn")


@dataclass(frozen=True)
class Plot:
    """x: a field or property of Case. y: "speedup" over the best dense layer, or "seconds"."""

    x: str
    y: str
    label: str


@dataclass(frozen=True)
class Suite:
    """per_neuron: whether its table shows the time of a token at a neuron that it visits."""

    name: str
    question: str
    cases: tuple[Case | ModelCase, ...]
    plots: tuple[Plot, ...]
    per_neuron: bool = False
