"""Draws a trained FFF as the tree it is: what each node looks for, and what each leaf is given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from data import Images
from inspection import leaves
from torch_fff import FFF

INK, FAINT, PAPER = "#222222", "#9a958c", "#fbfaf7"
LEFT, RIGHT = "#2166ac", "#b2182b"  # the two ends of the colour map RdBu
WIDTH, HEIGHT = 21, 12  # inches
SIDE = 0.052  # of a picture, as a share of the figure's width
CLASS_COLORS = [colormaps["tab10"](index) for index in range(10)]


def draw_tree(layer: FFF, images: Images, path: Path) -> None:
    """One picture per node (its weight, as an image) and per leaf (the mean of its test images)."""
    leaf = leaves(layer, images.test.pixels)[:, 0]
    shares = torch.bincount(leaf, minlength=layer.n_leaves) / len(leaf)
    figure = Figure(figsize=(WIDTH, HEIGHT), facecolor=PAPER)
    canvas = figure.add_axes((0, 0, 1, 1))
    canvas.set(xlim=(0, 1), ylim=(0, 1))
    canvas.axis("off")
    draw_words(canvas, layer, images)
    draw_edges(canvas, layer.depth, shares)
    draw_nodes(figure, layer, images.side, shares)
    for index in range(layer.n_leaves):
        centre = place(layer.depth, layer.depth, index)
        draw_leaf(picture(figure, centre), canvas, centre, images, leaf == index)
    figure.savefig(path, dpi=100)


def draw_words(canvas: Axes, layer: FFF, images: Images) -> None:
    canvas.text(0.015, 0.965, f"What an FFF learned from {images.name}", size=22, weight="bold")
    explanation = (
        "Each node weighs the image with the picture shown: ink on red pulls to the right\n"
        "branch, ink on blue to the left. Line width: share of the test images.\n"
        f"Each of the {layer.n_leaves} leaves shows the mean of the images that reach it,\n"
        "their share of all, their most frequent class and their mix of classes.\n"
        f"An image meets {layer.depth} nodes and one leaf network of {layer.w1.shape[1]} neurons."
    )
    canvas.text(0.015, 0.94, explanation, size=13, va="top", linespacing=1.5)
    classes = zip(CLASS_COLORS, images.classes, strict=True)
    canvas.legend(
        handles=[Patch(color=color, label=name) for color, name in classes],
        loc="lower center",
        ncol=len(images.classes),
        fontsize=13,
        frameon=False,
        handlelength=1,
        handleheight=1,
        columnspacing=1.4,
        bbox_to_anchor=(0.5, 0.01),
    )


def place(depth: int, level: int, position: int) -> tuple[float, float]:
    """Centre of a node in figure coordinates; level `depth` is that of the leaves."""
    return (position + 0.5) / 2**level, 0.235 + (1 - level / depth) * 0.65


def draw_edges(canvas: Axes, depth: int, shares: Tensor) -> None:
    t = np.linspace(0, 1, 40)
    for level in range(depth):
        for child, share in enumerate(shares.view(2 ** (level + 1), -1).sum(1).tolist()):
            (x0, y0), (x1, y1) = place(depth, level, child // 2), place(depth, level + 1, child)
            color = (RIGHT if child % 2 else LEFT) if share else FAINT
            width, line = (1 + 26 * share, "-") if share else (1, ":")
            x, y = x0 + (x1 - x0) * t**2 * (3 - 2 * t), y0 + (y1 - y0) * t
            canvas.plot(x, y, line, color=color, lw=width, alpha=0.55, solid_capstyle="butt")


def draw_nodes(figure: Figure, layer: FFF, side: int, shares: Tensor) -> None:
    for node, weight in enumerate(layer.node_weights.detach().view(-1, side, side)):
        level = (node + 1).bit_length() - 1
        position = node + 1 - 2**level
        limit = weight.abs().quantile(0.99).item()
        reached = shares.view(2**level, -1)[position].sum() > 0
        axes = picture(figure, place(layer.depth, level, position))
        axes.imshow(weight, "RdBu_r", vmin=-limit, vmax=limit, alpha=1.0 if reached else 0.25)


def draw_leaf(
    axes: Axes, canvas: Axes, centre: tuple[float, float], images: Images, reached: Tensor
) -> None:
    """The leaf's mean image in `axes`; below it, on the canvas, who comes here."""
    if not reached.any():
        axes.text(0.5, 0.5, "unused", size=12, ha="center", va="center", color=FAINT)
        axes.set_facecolor(PAPER)
        return
    here = images.test[reached]
    axes.imshow(here.pixels.mean(0).view(images.side, images.side), cmap="gray_r")
    mix = torch.bincount(here.labels, minlength=len(images.classes)) / len(here)
    x, y = centre
    canvas.text(x, y - 0.066, f"{reached.float().mean():.1%}", size=14, weight="bold", ha="center")
    canvas.text(x, y - 0.089, images.classes[int(mix.argmax())], size=12, ha="center")
    canvas.text(x, y - 0.110, f"{mix.max():.0%} of them", size=11, ha="center", color=FAINT)
    left = x - SIDE / 2 + SIDE * (mix.cumsum(0) - mix)
    canvas.barh([y - 0.132] * len(mix), SIDE * mix, 0.018, left=left, color=CLASS_COLORS)


def picture(figure: Figure, centre: tuple[float, float]) -> Axes:
    """A square frame around `centre` (figure coordinates)."""
    x, y = centre
    height = SIDE * WIDTH / HEIGHT
    axes = figure.add_axes((x - SIDE / 2, y - height / 2, SIDE, height))
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=INK, linewidth=1)
    return axes
