"""Draws validation losses against training steps and against training time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from results_figure import INK, PAPER, finish

COLORS = ("#a8a39a", "#6f6b64", "#1b7837", "#2166ac")


class Curve(Protocol):
    name: str
    losses: list[float]
    seconds: list[float]


def draw_losses(data: str, steps: int, curves: Sequence[Curve], path: Path) -> None:
    """``steps`` of training lie between two losses."""
    figure = Figure(figsize=(15, 6.6), facecolor=PAPER, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for curve, color in zip(curves, COLORS, strict=True):
        points = range(0, steps * len(curve.losses), steps)
        for axes, x in ((left, points), (right, curve.seconds)):
            axes.plot(x, curve.losses, color=color, lw=2.2, label=curve.name)
    dress(left, "training steps", f"{data}: validation loss, nats a byte")
    dress(right, "seconds of training", "The same by time")
    lowest = min(min(curve.losses) for curve in curves)
    left.set_ylim(lowest - 0.05, lowest + 1.2)
    figure.savefig(path, dpi=110)


def dress(axes: Axes, label: str, title: str) -> None:
    axes.set_xlabel(label, size=11)
    axes.set_xlim(left=0)
    axes.grid(axis="y", color=INK, alpha=0.1)
    finish(axes, title)
