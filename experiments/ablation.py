"""The recipe without each of its ingredients in turn, and with what might have helped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from .classification import Settings, run
from .experiment import Cell, Experiment
from .fashion_mnist import SOFT, ours
from .layers import Leaves
from .plots import figure, save
from .results import Results
from .tables import details, markdown, origin, percent
from .training import Recipe

SHAPES = ((8, 4), (1, 7))  # leaf width, depth
WHOLE = "the recipe"


def variants(layer: Leaves) -> dict[str, Settings]:
    recipe = Recipe()
    whole = Settings(layer, recipe)

    def trained(**changes: Any) -> Settings:
        return replace(whole, recipe=replace(recipe, **changes))

    def shaped(**changes: Any) -> Settings:
        return replace(whole, layer=replace(layer, **changes))

    nodes = "without node outputs" if layer.node_output else "with node outputs"
    return {
        WHOLE: whole,
        "no noise": trained(noise=0.0),
        "slope 1 throughout": trained(slope=1.0),
        "no balance": trained(balance=0.0),
        "no shared leaf base": shaped(shared_leaf_base=False),
        nodes: shaped(node_output=not layer.node_output),
        "no routing gradient": trained(routing="none"),
        "one alternate drawn": trained(alternates=1),
        "soft training, h = 3": replace(whole, recipe=SOFT),
        "region leak 0.05": trained(region_leak=0.05),
        "median splits": trained(splits="median"),
        "median splits along principal axes": trained(splits="principal"),
        "no weight decay of nodes": replace(whole, node_lr_scale=1.0),
        "nodes learn at half the rate": replace(whole, node_lr_scale=0.5),
    }


def name(leaf: int, depth: int, variant: str) -> str:
    return f"l={leaf} d={depth}: {variant}"


def cells() -> tuple[Cell, ...]:
    return tuple(
        Cell(name(leaf, depth, variant), settings)
        for leaf, depth in SHAPES
        for variant, settings in variants(ours(leaf, depth)).items()
    )


def table(results: Results) -> str:
    parts = [
        origin(results),
        "Test accuracy, percent, mean ± standard deviation over seeds; in brackets the difference "
        "to the recipe.",
    ]
    for leaf, depth in SHAPES:
        rows = []
        for variant in variants(ours(leaf, depth)):
            cell = name(leaf, depth, variant)
            value = percent(results, cell, "test")
            mean, whole = (results.mean(c, "test") for c in (cell, name(leaf, depth, WHOLE)))
            if variant != WHOLE and mean is not None and whole is not None:
                value += f" ({100 * (mean - whole):+.2f})"
            rows.append([variant, value, str(results.seeds(cell))])
        parts += [f"### FFF l={leaf} d={depth}", markdown(["", "test", "seeds"], rows)]
    return "\n\n".join([*parts, "### all figures", details(results)])


def plot(results: Results, path: Path) -> None:
    made, axes = figure(figsize=(9, 6))
    rows = [cell for cell in results.records if results.seeds(cell)]
    for row, cell in enumerate(rows):
        mean, spread = results.mean(cell, "test") or 0.0, results.deviation(cell, "test")
        color = "C0" if cell.endswith(WHOLE) else "C1"
        axes.errorbar(100 * mean, row, xerr=100 * spread, fmt="o", color=color, capsize=3)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="test accuracy, %", title="Fashion-MNIST, hard routing")
    axes.grid(alpha=0.2)
    save(made, path)


EXPERIMENT = Experiment(
    name="ablation",
    question="What is each ingredient of the recipe worth?",
    cells=cells(),
    run=run,
    table=table,
    plot=plot,
)
