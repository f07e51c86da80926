"""Results as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .results import Results


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Numbers to the right of the first column."""
    rules = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rules, *rows))


def percent(results: Results, cell: str, figure: str) -> str:
    """Mean +- sample standard deviation over the seeds, in percent; "-" if there is none."""
    mean = results.mean(cell, figure)
    if mean is None:
        return "-"
    if results.seeds(cell) == 1:
        return f"{100 * mean:.2f}"
    return f"{100 * mean:.2f} ± {100 * results.deviation(cell, figure):.2f}"


def number(format: str) -> Callable[[Results, str, str], str]:
    def show(results: Results, cell: str, figure: str) -> str:
        mean = results.mean(cell, figure)
        return "-" if mean is None else f"{mean:{format}}"

    return show


def leaves(results: Results, cell: str, figure: str) -> str:
    available = results.mean(cell, "leaves")
    return "-" if available is None else f"{results.mean(cell, figure):.0f} of {available:.0f}"


COLUMNS: dict[str, tuple[str, Callable[[Results, str, str], str]]] = {
    "test": ("test", percent),
    "memorisation": ("memorisation", percent),
    "validation": ("validation", percent),
    "soft_validation": ("soft validation", percent),
    "entropy": ("entropy, nats", number(".2f")),
    "leaves_used": ("leaves used", leaves),
    "epoch": ("chosen epoch", number(".0f")),
    "seconds": ("training, s", number(".0f")),
}


def details(results: Results, extra: dict[str, Callable[[str], str]] | None = None) -> str:
    """All figures of all cells that have been run. extra: more columns, from a cell's name."""
    extra = extra or {}
    head = ["cell", *extra, "seeds", *(title for title, _ in COLUMNS.values())]
    rows = [
        [
            cell,
            *(column(cell) for column in extra.values()),
            str(results.seeds(cell)),
            *(show(results, cell, figure) for figure, (_, show) in COLUMNS.items()),
        ]
        for cell in results.records
        if results.seeds(cell)
    ]
    return markdown(head, rows)


def origin(results: Results) -> str:
    """What the results were measured on."""
    records = [record for cell in results.records.values() for record in cell]
    if not records:
        return "No results yet."
    machines = sorted({f"{record.cpu}, torch {record.torch}" for record in records})
    hours = sum(record.seconds for record in records) / 3600
    last = max(record.date for record in records)[:10]
    return f"{len(records)} runs on {'; '.join(machines)}: {hours:.1f} core hours, to {last}."
