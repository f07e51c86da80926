"""What a run leaves behind: a JSON file that the other commands read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .case import Case, ModelCase
from .floors import Floors
from .machine import Machine
from .timing import Timing

SCHEMA = 1
OURS = "ours"
DENSE = ("dense-eager", "dense-compiled", "dense-onednn", "dense-cublaslt")
NO_FEEDFORWARD = "no-feedforward"


@dataclass
class CaseResult:
    """timings: by contender, "ours" among them.
    skipped: by contender, the reason why it has no timing.
    deviations: from the reference, relative; by tensor.
    floor: seconds that the machine's floors allow, see roofline.py; 0 for a whole model.
    error: why there is no result; "" where there is one.
    """

    case: Case | ModelCase
    timings: dict[str, Timing] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    deviations: dict[str, float] = field(default_factory=dict)
    floor: float = 0.0
    error: str = ""

    @property
    def ours(self) -> Timing | None:
        return self.timings.get(OURS)

    @property
    def best_dense(self) -> str | None:
        """The fastest dense baseline of equal width."""
        return self.fastest(DENSE)

    def fastest(self, names: tuple[str, ...]) -> str | None:
        timed = [name for name in names if name in self.timings]
        return min(timed, key=lambda name: self.timings[name].median, default=None)

    @property
    def speedup(self) -> float | None:
        """Over the best dense baseline."""
        if self.ours is None or self.best_dense is None:
            return None
        return self.timings[self.best_dense].median / self.ours.median


@dataclass
class Report:
    """malloc: "kept" or "system", see malloc.py. floors: before the first and after the last case.
    device: that of all cases, "cpu" or "cuda"; ``machine`` and ``floors`` are the GPU's then.

    A quick report shows that everything works; its numbers are not for quoting.
    """

    date: str
    command: str
    quick: bool
    malloc: str
    threads: int
    versions: dict[str, str]
    machine: Machine
    floors: list[Floors] = field(default_factory=list)
    cases: list[CaseResult] = field(default_factory=list)
    device: str = "cpu"

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n")

    def to_json(self) -> dict[str, Any]:
        """Names, speed-ups and best baselines are derived: for readers, not read back."""
        document = {"schema": SCHEMA, **asdict(self)}
        for entry, result in zip(document["cases"], self.cases, strict=True):
            entry["name"] = result.case.name
            entry["best_dense"] = result.best_dense
            entry["speedup"] = result.speedup
        return document

    @staticmethod
    def load(path: Path) -> Report:
        """Raises ValueError if the file is no report of this schema."""
        document = json.loads(path.read_text())
        schema = document.pop("schema", None) if isinstance(document, dict) else None
        if schema != SCHEMA:
            raise ValueError(f"benchmarks: {path}: expected schema {SCHEMA}, got {schema}")
        try:
            document["machine"] = Machine(**document["machine"])
            document["floors"] = [Floors(**floors) for floors in document["floors"]]
            document["cases"] = [_case_result(entry) for entry in document["cases"]]
            return Report(**document)
        except (KeyError, TypeError) as error:
            raise ValueError(f"benchmarks: {path}: not a report: {error}") from error


def _case_result(entry: dict[str, Any]) -> CaseResult:
    for derived in ("name", "best_dense", "speedup"):
        entry.pop(derived)
    case = entry.pop("case")
    case["baselines"] = tuple(case["baselines"])
    timings = {name: Timing(**timing) for name, timing in entry.pop("timings").items()}
    kind = ModelCase if "batch" in case else Case
    return CaseResult(case=kind(**case), timings=timings, **entry)
