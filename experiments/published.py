"""What 2405.16836 claims on Fashion-MNIST: load balancing and a master leaf in soft training."""

from __future__ import annotations

from pathlib import Path

from .classification import Settings, run
from .experiment import Cell, Experiment
from .layers import Leaves
from .plots import curve, figure, legend, save
from .results import Results
from .tables import details, markdown, origin, percent
from .training import Recipe

# by leaf width and depth: test accuracy of its checkpoints, hard routing
CHECKPOINTS = {
    **{(64, 1): 88.84, (32, 2): 88.06, (16, 3): 87.38, (8, 1): 86.10, (8, 4): 86.69},
    **{(4, 2): 85.79, (4, 5): 85.76, (2, 3): 84.64, (2, 6): 84.83, (1, 4): 80.28, (1, 7): 79.86},
}
VARIANTS = {  # weight of the balance loss, width of the master leaf
    "neither": (0.0, 0),
    "balance": (1.0, 0),
    "master leaf": (0.0, 8),
    "both": (1.0, 8),
}


def name(leaf: int, depth: int, variant: str) -> str:
    return f"l={leaf} d={depth} {variant}"


def cells() -> tuple[Cell, ...]:
    made = []
    for leaf, depth in CHECKPOINTS:
        for variant, (balance, master) in VARIANTS.items():
            layer = Leaves(leaf, depth, master_leaf_width=master)
            recipe = Recipe("soft", 0.0, 1.0, balance, hardening=3.0, hardening_first=1.0)
            settings = Settings(
                layer, recipe, epochs=40, learning_rate=1e-3, decay="none", centred=True
            )
            made.append(Cell(name(leaf, depth, variant), settings))
    return tuple(made)


def table(results: Results) -> str:
    head = ["", "its checkpoint", *VARIANTS, "leaves used: neither", "balance"]
    rows = []
    for (leaf, depth), checkpoint in CHECKPOINTS.items():
        row = [f"l={leaf} d={depth}", f"{checkpoint:.1f}"]
        row += [percent(results, name(leaf, depth, variant), "test") for variant in VARIANTS]
        for variant in ("neither", "balance"):
            used = results.mean(name(leaf, depth, variant), "leaves_used")
            row.append("-" if used is None else f"{used:.1f} of {2**depth}")
        rows.append(row)
    note = (
        "Test accuracy, percent, hard routing, mean ± standard deviation over seeds; chosen on "
        "validation, while the checkpoints were chosen on the test set. Soft training with entropy "
        "weight 1, then 3; balance weight 1; a master leaf of 8 neurons is visited in addition."
    )
    parts = [origin(results), note, markdown(head, rows)]
    return "\n\n".join([*parts, "### all figures", details(results)])


def plot(results: Results, path: Path) -> None:
    made, axes = figure(figsize=(9, 5))
    shapes = list(CHECKPOINTS)
    for variant in VARIANTS:
        points = [(x, name(*shape, variant)) for x, shape in enumerate(shapes)]
        curve(axes, results, points, "test", "o", label=variant)
    axes.plot(range(len(shapes)), CHECKPOINTS.values(), "kx", label="its checkpoints")
    axes.set_xticks(range(len(shapes)), [f"l={leaf}\nd={depth}" for leaf, depth in shapes])
    axes.set(ylabel="test accuracy, %", title="Fashion-MNIST, soft training, hard inference")
    axes.grid(alpha=0.2)
    legend(axes, fontsize=8)
    save(made, path)


EXPERIMENT = Experiment(
    name="published",
    question="2405.16836: are load balancing and a master leaf worth what they claim?",
    cells=cells(),
    run=run,
    table=table,
    plot=plot,
)
