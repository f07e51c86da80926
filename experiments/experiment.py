"""What an experiment is: named cells, a function that runs one, and how results are shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from .results import Record, Results
from .settings import same

Figures = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One line of a table. settings: a frozen dataclass of what JSON can hold."""

    name: str
    settings: Any

    def fits(self, record: Record) -> bool:
        return record.cell == self.name and same(self.settings, record.settings)


@dataclass(frozen=True)
class Experiment:
    """run(settings, seed) -> figures: a pure function, importable by name.

    table(results): Markdown. plot(results, path): writes a PNG; results has only those of
    ``cells``.
    """

    name: str
    question: str
    cells: tuple[Cell, ...]
    run: Callable[[Any, int], Figures]
    table: Callable[[Results], str]
    plot: Callable[[Results, Path], None]
    seeds: int = 5

    def select(self, pattern: str | None) -> list[Cell]:
        """The cells whose name has ``pattern`` as a part or fits it as a glob."""
        wanted = [
            cell
            for cell in self.cells
            if not pattern or pattern in cell.name or fnmatchcase(cell.name, pattern)
        ]
        if not wanted:
            names = ", ".join(cell.name for cell in self.cells)
            raise ValueError(f"{self.name}: --only: expected one of {names}, got {pattern}")
        return wanted

    def with_settings(self, changes: dict[str, Any]) -> Experiment:
        """The same experiment with some settings of all cells changed."""
        cells = tuple(Cell(cell.name, _changed(cell.settings, changes)) for cell in self.cells)
        return replace(self, cells=cells)

    def results(self, folder: Path) -> Results:
        """What is known of the cells as they are now set; of a seed that ran twice, the last."""
        records = read(self.path(folder))
        found = {
            cell.name: {record.seed: record for record in records if cell.fits(record)}
            for cell in self.cells
        }
        return Results({name: list(seeds.values()) for name, seeds in found.items()})

    def path(self, folder: Path) -> Path:
        return folder / f"{self.name}.jsonl"


def read(path: Path) -> list[Record]:
    return list(_records(path)) if path.exists() else []


def _records(path: Path) -> Iterator[Record]:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            yield Record(**json.loads(line))
        except (TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: line {number}: expected a run's record: {error}") from None


def _changed(settings: Any, changes: dict[str, Any]) -> Any:
    known = [field.name for field in fields(settings)]
    unknown = sorted(set(changes) - set(known))
    if unknown:
        raise ValueError(f"--set: expected one of {', '.join(known)}, got {', '.join(unknown)}")
    return replace(settings, **changes)
