"""The demo's results as data, as Markdown tables and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from timing import BATCHES, Block, Timing


@dataclass(frozen=True)
class Result:
    """Accuracies are on the test split; a dense layer has no soft form, entropy or leaves."""

    name: str
    hard: float
    soft: float | None
    entropy: float | None
    leaves_used: int | None
    leaves: int | None
    neurons: int
    neurons_all: int
    parameters: int
    parameters_all: int


def results_table(results: list[Result]) -> str:
    header = ("layer", "accuracy, hard", "soft", "node entropy", "leaves used")
    return table(
        (*header, "neurons a sample", "parameters a sample"),
        [
            (
                result.name,
                f"{result.hard:.2%}",
                "" if result.soft is None else f"{result.soft:.2%}",
                "" if result.entropy is None else f"{result.entropy:.3f}",
                "" if result.leaves is None else f"{result.leaves_used} of {result.leaves}",
                f"{result.neurons} of {result.neurons_all}",
                f"{result.parameters:,} of {result.parameters_all:,}",
            )
            for result in results
        ],
    )


def timing_table(block: Block, timings: list[Timing]) -> str:
    """Microseconds per sample, one row a layer."""
    time = {(t.name, t.mode, t.batch): t.microseconds for t in timings if t.block == block.name}
    columns = [(mode, batch) for mode in ("eager", "compiled") for batch in BATCHES]
    columns = [column for column in columns if (block.baseline, *column) in time]
    return table(
        (f"{block.name}: us a sample", *(f"{mode} {batch}" for mode, batch in columns)),
        [(n, *(f"{time[n, m, b]:.2f}" for m, b in columns)) for n in block.layers],
    )


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown, padded so that it also reads well on a terminal; numbers to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = [
        " | ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]
    rule = " | ".join("-" * (w - 1) + (":" if i else "-") for i, w in enumerate(widths))
    return "\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:]))


def as_json(
    data: str, settings: dict[str, object], results: list[Result], timings: list[Timing]
) -> str:
    record = {
        "data": data,
        **settings,
        "results": [asdict(result) for result in results],
        "timings": [asdict(timing) for timing in timings],
    }
    return json.dumps(record, indent=2) + "\n"
