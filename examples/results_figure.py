"""Draws what the demo measured: accuracy beside inference width, and speed beside a dense layer."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from report import Result
from timing import BATCHES, Block, Timing

PAPER, INK = "#fbfaf7", "#222222"


def draw_results(
    data: str, results: list[Result], blocks: list[Block], timings: list[Timing], path: Path
) -> None:
    """Accuracy on the left; for each block, how many times faster than its widest dense layer."""
    figure = Figure(figsize=(18, 6.6), facecolor=PAPER, layout="constrained")
    panels = figure.subplots(1, 1 + len(blocks), width_ratios=[1.25] + [1] * len(blocks))
    draw_accuracy(panels[0], data, results)
    for axes, block in zip(panels[1:], blocks, strict=True):
        draw_speed(axes, block, [timing for timing in timings if timing.block == block.name])
    figure.savefig(path, dpi=110)


def draw_accuracy(axes: Axes, data: str, results: list[Result]) -> None:
    accuracies = [a for result in results for a in (result.hard, result.soft) if a is not None]
    left = max(0.0, min(accuracies) - 0.02)
    for row, result in enumerate(results):
        axes.barh(row, result.hard - left, 0.62, left=left, color=color_of(result.name))
        percent = axes.text(left + 0.001, row, f"{result.hard:.1%}", va="center", weight="bold")
        percent.set(color="white", size=13)
        if result.soft is not None:
            axes.plot(result.soft, row, "D", ms=9, mfc=PAPER, mec=INK, mew=1.4)
    axes.plot([], [], "D", ms=9, mfc=PAPER, mec=INK, mew=1.4, label="same weights, soft routing")
    axes.set_yticks(range(len(results)), [label(result) for result in results], size=11)
    axes.invert_yaxis()
    axes.set_xlim(left, max(accuracies) + 0.004)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("test accuracy (the axis does not start at 0)", size=11)
    finish(axes, f"{data}: accuracy with hard routing")


def color_of(name: str) -> str:
    if name.startswith("dense"):
        return "#6f6b64" if name.endswith("12") else "#a8a39a"
    if name.startswith("UltraFFF"):
        return "#1b7837"
    return "#e08214" if name.endswith("published") else "#2166ac"


def label(result: Result) -> str:
    return f"{result.name}\n{result.neurons} of {result.neurons_all} neurons a sample"


def draw_speed(axes: Axes, block: Block, timings: list[Timing]) -> None:
    time = {(t.name, t.mode, t.batch): t.microseconds for t in timings}
    for name in block.layers:
        if name == block.baseline:
            continue
        for mode, style in (("eager", "o-"), ("compiled", "s--")):
            if (name, mode, BATCHES[0]) in time:
                ratio = [time[block.baseline, mode, b] / time[name, mode, b] for b in BATCHES]
                axes.plot(BATCHES, ratio, style, color=color_of(name), lw=2, ms=7)
        axes.plot([], [], lw=3, color=color_of(name), label=name)
    axes.axhline(1, color=INK, lw=1, ls=":")
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("batch size (solid: eager, dashed: compiled)", size=11)
    axes.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.grid(axis="y", color=INK, alpha=0.1)
    finish(axes, f"{block.name}: speed-up over {block.baseline}")


def finish(axes: Axes, title: str) -> None:
    axes.set_facecolor(PAPER)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", weight="bold", size=14, pad=12)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=2, frameon=False, fontsize=11)
