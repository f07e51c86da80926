"""What runs leave behind: one line of JSON each, appended when it ends."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Record:
    """settings: as JSON. seconds: of the whole run."""

    cell: str
    settings: dict[str, Any]
    seed: int
    figures: dict[str, Any]
    seconds: float
    torch: str
    cpu: str
    date: str

    def append_to(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(asdict(self)) + "\n")


@dataclass(frozen=True)
class Results:
    """The records of each cell, one a seed."""

    records: dict[str, list[Record]]

    def seeds(self, cell: str) -> int:
        return len(self.records[cell])

    def values(self, cell: str, figure: str) -> list[Any]:
        """Of all seeds that have the figure."""
        values = [record.figures.get(figure) for record in self.records[cell]]
        return [value for value in values if value is not None]

    def mean(self, cell: str, figure: str) -> float | None:
        values = self.values(cell, figure)
        return statistics.fmean(values) if values else None

    def deviation(self, cell: str, figure: str) -> float:
        """Sample standard deviation over seeds; 0 for one seed."""
        values = self.values(cell, figure)
        return statistics.stdev(values) if len(values) > 1 else 0.0
