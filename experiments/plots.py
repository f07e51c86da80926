"""What all figures share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .results import Results


def figure(**size: Any) -> tuple[Any, Any]:
    """(figure, its axes)"""
    return figures(1, 1, **size)


def figures(rows: int, columns: int, sharey: bool = False, **size: Any) -> tuple[Any, Any]:
    """(figure, the axes of its panels)"""
    from matplotlib.figure import Figure  # an optional dependency, and slow to import

    made = Figure(layout="constrained", **size)
    return made, made.subplots(rows, columns, sharey=sharey)


def save(made: Any, path: Path) -> None:
    made.savefig(path, dpi=120)


def curve(
    axes: Any,
    results: Results,
    points: Sequence[tuple[float, str]],
    figure: str,
    style: str,
    **options: Any,
) -> None:
    """Means with their deviation, in percent. points: (x, cell)."""
    known = [(x, cell) for x, cell in points if results.mean(cell, figure) is not None]
    if known:
        axes.errorbar(
            [x for x, _ in known],
            [100 * (results.mean(cell, figure) or 0) for _, cell in known],
            [100 * results.deviation(cell, figure) for _, cell in known],
            fmt=style,
            capsize=2,
            **options,
        )


def legend(axes: Any, **options: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**options)


def widths(axes: Any, ticks: Sequence[int]) -> None:
    """A logarithmic axis of widths."""
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
