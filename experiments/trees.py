"""Accuracy against neurons visited: trees of neurons, trees of leaves, several of either, dense."""

from __future__ import annotations

from pathlib import Path

from .classification import Settings, run
from .experiment import Cell, Experiment
from .layers import Dense, Leaves, Neurons
from .plots import curve, figure, legend, save, widths
from .results import Results
from .tables import details, markdown, origin, percent
from .training import Recipe


def plain(leaf_width: int, depth: int, trees: int = 1) -> Leaves:
    return Leaves(leaf_width, depth, trees, shared_leaf_base=True)


def with_outputs(leaf_width: int, depth: int, trees: int = 1) -> Leaves:
    return Leaves(leaf_width, depth, trees, node_output=True, shared_leaf_base=True)


FAMILIES: dict[str, tuple[Leaves | Neurons, ...]] = {
    "one tree of neurons": tuple(Neurons(1, depth) for depth in (4, 6, 9)),
    "K trees of neurons": (
        *(Neurons(2, 4), Neurons(2, 7), Neurons(4, 4), Neurons(8, 3), Neurons(4, 7)),
        *(Neurons(8, 4), Neurons(16, 3), Neurons(16, 4)),
    ),
    "FFF": (
        *(plain(4, 3), plain(8, 2), plain(8, 4), plain(8, 6), plain(16, 3), plain(16, 5)),
        *(plain(28, 4), plain(32, 2), plain(32, 5)),
    ),
    "FFF, node outputs": (
        *(with_outputs(1, 5), with_outputs(1, 7), with_outputs(1, 9), with_outputs(2, 6)),
        *(with_outputs(8, 4), with_outputs(16, 3)),
    ),
    "K FFF": (
        *(plain(4, 4, 2), plain(8, 4, 2), plain(12, 4, 2), plain(4, 3, 4)),
        *(plain(5, 3, 4), plain(4, 4, 4), plain(8, 4, 4), plain(2, 2, 8), plain(4, 4, 8)),
    ),
    "K FFF, node outputs": (
        *(with_outputs(1, 4, 2), with_outputs(1, 7, 2), with_outputs(1, 4, 4)),
        *(with_outputs(1, 7, 4), with_outputs(1, 4, 8), with_outputs(1, 4, 16)),
    ),
}
TREES = [layer for family in FAMILIES.values() for layer in family]
WIDE = (128, 256, 512, 1024, 2048)  # the training widths, to the next power of 2


def dense_widths() -> list[int]:
    return sorted({layer.visited for layer in TREES} | set(WIDE))


def training_width(layer: Leaves | Neurons) -> int:
    return min(WIDE, key=lambda width: abs(width - layer.neurons))


def cells() -> tuple[Cell, ...]:
    trees = [Cell(layer.name, Settings(layer, Recipe())) for layer in TREES]
    dense = [Cell(layer.name, Settings(layer)) for layer in map(Dense, dense_widths())]
    return (*trees, *dense)


def table(results: Results) -> str:
    head = ["", "visited", "neurons", "test", "FF as narrow", "FF as wide", "seeds"]
    rows = []
    for family, layers in FAMILIES.items():
        rows.append([f"**{family}**", *[""] * (len(head) - 1)])
        for layer in layers:
            narrow, wide = Dense(layer.visited).name, Dense(training_width(layer)).name
            row = [layer.name, str(layer.visited), str(layer.neurons)]
            row.append(percent(results, layer.name, "test"))
            row.append(percent(results, narrow, "test"))
            row.append(f"{percent(results, wide, 'test')} ({wide.removeprefix('FF ')})")
            rows.append([*row, str(results.seeds(layer.name))])
    note = (
        "Test accuracy, percent, mean ± standard deviation over seeds. Visited: neurons that an "
        "image touches, nodes that only decide included. The last columns are dense layers of as "
        "many neurons as are visited, and of the power of 2 next to all neurons."
    )
    parts = [origin(results), note, markdown(head, rows)]
    return "\n\n".join([*parts, "### all figures", details(results)])


def plot(results: Results, path: Path) -> None:
    made, axes = figure(figsize=(9, 6))
    dense = [(width, Dense(width).name) for width in dense_widths()]
    curve(axes, results, dense, "test", ".-", color="gray", label="FF")
    for number, (family, layers) in enumerate(FAMILIES.items()):
        points = sorted((layer.visited, layer.name) for layer in layers)
        curve(axes, results, points, "test", "o--", color=f"C{number}", label=family, lw=0.7)
        for x, cell in points:
            mean = results.mean(cell, "test")
            if mean is not None:
                text = cell.removeprefix("UltraFFF ").removeprefix("FFF ").split(",")[0]
                axes.annotate(
                    text, (x, 100 * mean), (4, -3), textcoords="offset points", fontsize=6
                )
    widths(axes, (5, 8, 16, 32, 64, *WIDE))
    axes.set(
        xlabel="neurons visited", ylabel="test accuracy, %", title="Fashion-MNIST, hard routing"
    )
    axes.grid(alpha=0.2)
    legend(axes, fontsize=8, loc="lower right")
    save(made, path)


EXPERIMENT = Experiment(
    name="trees",
    question="How accurate are trees of all forms for the neurons that an input visits?",
    cells=cells(),
    run=run,
    table=table,
    plot=plot,
)
