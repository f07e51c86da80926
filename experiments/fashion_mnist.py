"""The Fashion-MNIST part of 2308.14711's table 1, trained as published and by the recipe."""

from __future__ import annotations

from pathlib import Path

from .classification import Settings, run
from .experiment import Cell, Experiment
from .layers import Dense, Leaves
from .plots import curve, figure, legend, save, widths
from .results import Results
from .tables import details, markdown, origin, percent
from .training import Recipe

WIDTHS = (16, 32, 64, 128, 512)
LEAF_WIDTHS = (8, 4, 2, 1)

# by leaf width (0: the dense layer) and training width: memorisation, generalisation
PAPER = {
    0: {16: (91.0, 86.4), 32: (94.8, 87.8), 64: (98.5, 89.0), 128: (99.3, 89.6)},
    8: {16: (86.7, 84.2), 32: (87.8, 85.2), 64: (88.8, 85.2), 128: (90.5, 86.1), 512: (97.1, 88.1)},
    4: {16: (86.4, 83.3), 32: (86.6, 84.5), 64: (89.1, 85.1), 128: (89.0, 85.4)},
    2: {16: (84.5, 83.0), 32: (85.4, 82.9), 64: (87.2, 84.1), 128: (87.3, 84.3)},
    1: {16: (79.7, 78.4), 32: (79.4, 77.8), 64: (79.9, 79.5), 128: (78.7, 77.7)},
}
GRID = [(leaf, width) for leaf in LEAF_WIDTHS for width in PAPER[leaf]]

PUBLISHED = {"optimizer": "sgd", "learning_rate": 0.2, "weight_decay": 0.0, "decay": "none"}
PUBLISHED_EPOCHS = 40
SOFT = Recipe("soft", noise=0.0, slope=1.0, balance=0.0, hardening=3.0)


def ours(leaf: int, depth: int) -> Leaves:
    """The recipe's layer: leaves learn from a shared base, narrow ones get help from the nodes."""
    return Leaves(leaf, depth, node_output=leaf <= 2, shared_leaf_base=True)


def depth_of(leaf: int, width: int) -> int:
    return (width // leaf).bit_length() - 1


def inference_widths() -> list[int]:
    return sorted({depth_of(leaf, width) + leaf for leaf, width in GRID})


def cells() -> tuple[Cell, ...]:
    made = []
    for leaf, width in GRID:
        name, depth = f"FFF l={leaf} w={width}", depth_of(leaf, width)
        made.append(Cell(f"{name} ours", Settings(ours(leaf, depth), Recipe())))
        published = Settings(Leaves(leaf, depth), SOFT, epochs=PUBLISHED_EPOCHS, **PUBLISHED)
        made.append(Cell(f"{name} published", published))
    for width in WIDTHS:
        made.append(Cell(f"FF w={width}", Settings(Dense(width))))
    for width in PAPER[0]:
        published = Settings(Dense(width), epochs=PUBLISHED_EPOCHS, **PUBLISHED)
        made.append(Cell(f"FF w={width} published", published))
    for width in inference_widths():
        made.append(Cell(f"FF w={width}", Settings(Dense(width))))
    return tuple(made)


def table(results: Results) -> str:
    parts = [
        origin(results),
        "Mean ± standard deviation over seeds, in percent; in brackets the paper's best of 10 "
        "runs, beside which the published rows also have the seed that is best on validation. "
        "Memorisation is the training accuracy of the same weights, those that were best on "
        "validation (the paper's is the best of a training to convergence).",
    ]
    for number, (title, column) in enumerate((("memorisation", "memorisation"), ("test", "test"))):
        parts += [f"### {title}", _grid(results, column, number)]
    parts += ["### all figures", details(results)]
    return "\n\n".join(parts)


def _grid(results: Results, figure: str, number: int) -> str:
    head = ["", *(f"w={width}" for width in WIDTHS)]
    rows = []
    for leaf in PAPER:
        for training in ("ours", "published") if leaf else ("", "published"):
            name = f"FFF l={leaf}" if leaf else "FF"
            row = [f"{name}, {training or 'AdamW'}"]
            for width in WIDTHS:
                cell = f"{name} w={width} {training}".strip()
                text = percent(results, cell, figure) if cell in results.records else ""
                if training == "published" and text:
                    text += _best(results, cell, figure)
                if width in PAPER[leaf]:
                    text += f" ({PAPER[leaf][width][number]})"
                row.append(text)
            rows.append(row)
    rows += [_equal_inference_width(results, leaf, figure) for leaf in LEAF_WIDTHS]
    return markdown(head, rows)


def _best(results: Results, cell: str, figure: str) -> str:
    """Of several seeds the one with the best validation accuracy."""
    if results.seeds(cell) < 2:
        return ""
    best = max(results.records[cell], key=lambda record: record.figures["validation"])
    return f", best {100 * best.figures[figure]:.2f}"


def _equal_inference_width(results: Results, leaf: int, figure: str) -> list[str]:
    row = [f"FF as narrow as l={leaf} in inference"]
    for width in WIDTHS:
        narrow = depth_of(leaf, width) + leaf
        known = width in PAPER[leaf]
        row.append(f"{percent(results, f'FF w={narrow}', figure)} (w={narrow})" if known else "")
    return row


def plot(results: Results, path: Path) -> None:
    made, axes = figure(figsize=(9, 6))
    for number, leaf in enumerate(LEAF_WIDTHS):
        color, known = f"C{number}", list(PAPER[leaf])
        for training, style in (("ours", "o-"), ("published", "s--")):
            points = [(width, f"FFF l={leaf} w={width} {training}") for width in known]
            curve(axes, results, points, "test", style, color=color)
        paper = [PAPER[leaf][width][1] for width in known]
        axes.plot(known, paper, "x:", color=color, lw=1)
        axes.plot([], [], color=color, lw=4, label=f"FFF l={leaf}")
    points = [(width, f"FF w={width}") for width in (*inference_widths(), *WIDTHS)]
    curve(axes, results, points, "test", ".-", color="gray", label="FF of that width")
    for style, label in (("o-", "recipe"), ("s--", "as published"), ("x:", "paper, best of 10")):
        axes.plot([], [], style, color="black", label=label)
    widths(axes, (5, 8, 12, *WIDTHS))
    axes.set(
        xlabel="training width", ylabel="test accuracy, %", title="Fashion-MNIST, hard routing"
    )
    axes.grid(alpha=0.2)
    legend(axes, fontsize=8, ncol=2)
    save(made, path)


EXPERIMENT = Experiment(
    name="fashion_mnist",
    question="Table 1 of 2308.14711: FFF of every leaf width as published and by the recipe.",
    cells=cells(),
    run=run,
    table=table,
    plot=plot,
)
