"""Two reports side by side: what got slower beyond noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .results import CaseResult, Report
from .text import ratio, seconds
from .timing import Timing

SLOWER, FASTER, SAME, FAILED = "SLOWER", "faster", "same", "FAILED"
ABSENT = "not in both"


@dataclass(frozen=True)
class Comparison:
    name: str
    verdict: str
    before: str
    after: str
    change: str

    @property
    def regression(self) -> bool:
        return self.verdict in (SLOWER, FAILED)


def compare_files(before: Path, after: Path, tolerance: float) -> int:
    """Print a table; the exit status: 1 if any case got slower or fails now."""
    comparisons = compare(Report.load(before), Report.load(after), tolerance)
    width = max((len(entry.name) for entry in comparisons), default=0)
    for entry in comparisons:
        times = f"{entry.before:>9} -> {entry.after:>9}  {entry.change:>7}"
        print(f"{entry.name:{width}}  {times}  {entry.verdict}")
    regressions = sum(entry.regression for entry in comparisons)
    compared = sum(entry.verdict != ABSENT for entry in comparisons)
    print(f"{regressions} of {compared} cases got slower or fail")
    if not compared:
        print("no case is in both reports: nothing was compared")
    return 1 if regressions or not compared else 0


def compare(before: Report, after: Report, tolerance: float) -> list[Comparison]:
    old = {result.case.name: result for result in before.cases}
    new = {result.case.name: result for result in after.cases}
    names = [*old, *(name for name in new if name not in old)]
    return [_compare_case(name, old.get(name), new.get(name), tolerance) for name in names]


def _compare_case(
    name: str, before: CaseResult | None, after: CaseResult | None, tolerance: float
) -> Comparison:
    old = before.ours if before else None
    new = after.ours if after else None
    shown = (seconds(old.median) if old else "-", seconds(new.median) if new else "-")
    if before is None or after is None or old is None:
        return Comparison(name, ABSENT, *shown, "")
    if new is None:
        return Comparison(name, FAILED, *shown, "")
    verdict = SAME
    if _slower(before, after, tolerance):
        verdict = SLOWER
    elif _slower(after, before, tolerance):
        verdict = FASTER
    return Comparison(name, verdict, *shown, ratio(new.median / old.median))


def _slower(before: CaseResult, after: CaseResult, tolerance: float) -> bool:
    """Slower in seconds, and relative to the best dense layer of the same run.

    Seconds alone would blame a layer for a slower machine, the ratio alone for a dense layer that
    happened to be fast.
    """
    old, new = before.ours, after.ours
    assert old is not None
    assert new is not None
    beyond = _beyond(_interval(old), _interval(new), tolerance)
    if before.best_dense is None or after.best_dense is None:
        return beyond
    old_dense, new_dense = before.timings[before.best_dense], after.timings[after.best_dense]
    return beyond and _beyond(_relative(old, old_dense), _relative(new, new_dense), tolerance)


Interval = tuple[float, float, float]  # low, median, high


def _interval(timing: Timing) -> Interval:
    return timing.low, timing.median, timing.high


def _relative(timing: Timing, dense: Timing) -> Interval:
    return timing.low / dense.high, timing.median / dense.median, timing.high / dense.low


def _beyond(before: Interval, after: Interval, tolerance: float) -> bool:
    """The quartiles do not overlap, and the median grew by more than the tolerance."""
    return after[0] > before[2] and after[1] > before[1] * (1 + tolerance)
