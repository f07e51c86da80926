"""A tree as a picture: branches by their width, nodes by their split, leaves as bars below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps, pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from torch import Tensor

_BRANCH, _FAINT, _LEAF = "#8a99a6", "#bbbbbb", "#5b7f95"
_SPLIT = colormaps["coolwarm"]  # blue sends all its tokens left, red all right
_FIGURES_UP_TO = 4  # levels: beyond that they would overlap
_LEAVES_AT = 0.36  # heights in a picture of height 1: where branches end, and the bars between
_BARS_FROM, _BARS_TO = 0.06, 0.31


def draw(
    depth: int,
    leaf: Tensor,
    labels: Tensor | None,
    classes: Sequence[str] | None,
    title: str,
    ax: Axes | None,
) -> Axes:
    """``leaf`` [tokens] in [0, 2^depth) is where tokens end, ``labels`` [tokens] their classes."""
    counts = torch.bincount(leaf, minlength=2**depth)
    levels = [counts.view(2**level, -1).sum(1).tolist() for level in range(depth + 1)]
    if ax is None:
        size = (max(7.0, 0.12 * 2**depth), 6.0)
        ax = pyplot.figure(figsize=size, layout="constrained").add_subplot()
    ax.set(xlim=(0, 1), ylim=(0, 1.05))
    ax.axis("off")
    ax.set_title(title, fontsize=10)
    ax.text(0, 1.02, "nodes: share sent right, blue 0, red 1", size=7, color="#555555")
    for level in range(1, depth + 1):
        _draw_branches(ax, depth, level, levels[level])
    for level in range(depth):
        _draw_nodes(ax, depth, level, levels[level], levels[level + 1])
    _draw_leaves(ax, depth, levels[depth], _majority(leaf, labels, 2**depth), classes)
    return ax


def _place(depth: int, level: int, position: int) -> tuple[float, float]:
    height = 1 - level / depth if depth else 0.0
    return (position + 0.5) / 2**level, _LEAVES_AT + (1 - _LEAVES_AT) * height


def _draw_branches(ax: Axes, depth: int, level: int, counts: list[int]) -> None:
    """From the nodes above to the nodes (or leaves) of ``level``."""
    t = np.linspace(0, 1, 24)
    for child, count in enumerate(counts):
        (x0, y0), (x1, y1) = _place(depth, level - 1, child // 2), _place(depth, level, child)
        style: dict[str, Any] = {"color": _FAINT, "lw": 0.6, "ls": ":"}
        if count:
            width = 0.5 + 16 * count / sum(counts)
            style = {"color": _BRANCH, "lw": width, "solid_capstyle": "butt"}
        ax.plot(x0 + (x1 - x0) * t**2 * (3 - 2 * t), y0 + (y1 - y0) * t, zorder=1, **style)


def _draw_nodes(ax: Axes, depth: int, level: int, counts: list[int], below: list[int]) -> None:
    figures = depth <= _FIGURES_UP_TO
    for node, count in enumerate(counts):
        x, y = _place(depth, level, node)
        right = below[2 * node + 1] / count if count else None
        colour = "white" if right is None else _SPLIT(right)
        size = 23 if figures else max(3.0, 12 - 1.5 * level)
        ax.plot(x, y, "o", ms=size, mfc=colour, mec=_FAINT if right is None else "black", mew=0.5)
        if figures and right is not None:
            ink = "white" if abs(right - 0.5) > 0.35 else "black"
            ax.text(x, y, f"{right:.0%}", size=7, color=ink, ha="center", va="center", zorder=3)


def _draw_leaves(
    ax: Axes,
    depth: int,
    counts: list[int],
    majority: list[int | None],
    classes: Sequence[str] | None,
) -> None:
    total, leaves = sum(counts), len(counts)
    scale = (_BARS_TO - _BARS_FROM) * total / max(counts)
    heights = [scale * count / total for count in counts]
    palette = colormaps["tab10" if max([0, *(c for c in majority if c)]) < 10 else "tab20"]
    colours = [_LEAF if c is None else palette(c % palette.N) for c in majority]
    centres = [_place(depth, depth, leaf)[0] for leaf in range(leaves)]
    ax.bar(centres, heights, 0.8 / leaves, _BARS_FROM, color=colours)
    even = _BARS_FROM + scale / leaves
    ax.plot((0, 1), (even, even), "--", color="black", lw=0.6)
    ax.plot((0, 1), (_BARS_FROM, _BARS_FROM), color=_FAINT, lw=0.6)
    if depth <= _FIGURES_UP_TO:
        for x, height, count in zip(centres, heights, counts, strict=True):
            text = f"{count / total:.1%}" if count else "unused"
            ax.text(x, _BARS_FROM + height + 0.005, text, size=7, ha="center", va="bottom")
    present = sorted({c for c in majority if c is not None})
    if present:
        names = [str(c) if classes is None else classes[c] for c in present]
        handles = [
            Patch(color=palette(c % palette.N), label=n)
            for c, n in zip(present, names, strict=True)
        ]
        ax.legend(handles=handles, loc="lower center", ncol=10, fontsize=8, frameon=False,
                  bbox_to_anchor=(0.5, -0.07), handlelength=1)  # fmt: skip


def _majority(leaf: Tensor, labels: Tensor | None, leaves: int) -> list[int | None]:
    """The most frequent label of each leaf's tokens, None without any."""
    if labels is None:
        return [None] * leaves
    kinds = int(labels.max()) + 1
    table = torch.bincount(leaf * kinds + labels, minlength=leaves * kinds).view(leaves, kinds)
    return [int(row.argmax()) if row.any() else None for row in table]
