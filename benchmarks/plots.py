"""Reports as PNG files: one a plot of a suite, on logarithmic axes, with the floor drawn in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .results import OURS, CaseResult, Report
from .suites import SUITES, Plot

Points = list[tuple[float, float]]
# Colours tell series apart, styles (of matplotlib) what is drawn of each.
_SECONDS = {OURS: "o-", "best dense": "s--", "experts": "x-.", "published": "+-.", "floor": ":"}
_SPEEDUP = {"over the best dense layer": "o-", "if at the floor": ":"}
_MOST_TICKS = 16


def plot_files(paths: list[Path], directory: Path) -> list[Path]:
    """All plots for which the reports have cases; several reports share a plot."""
    from matplotlib.figure import Figure  # an optional dependency, and slow to import

    reports = {path.stem: Report.load(path) for path in paths}
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for suite in SUITES.values():
        for plot in suite.plots:
            series = _series(reports, suite.name, plot.x)
            if not series:
                continue
            figure = Figure(figsize=(9, 5.5), layout="constrained")
            axes = figure.subplots()
            _draw(axes, plot, series)
            axes.set_title(f"{suite.name}: {suite.question}", fontsize=9, wrap=True)
            path = directory / f"{suite.name}-{plot.y}-{plot.x}.png"
            figure.savefig(path, dpi=120)
            written.append(path)
    return written


def _series(reports: dict[str, Report], suite: str, axis: str) -> dict[str, list[CaseResult]]:
    """Results that differ along the axis only, in its order."""
    series: dict[str, list[CaseResult]] = {}
    for stem, report in reports.items():
        prefix = f"{stem}: " if len(reports) > 1 else ""
        for result in report.cases:
            if result.case.suite == suite and result.ours:
                series.setdefault(prefix + result.case.series(axis), []).append(result)
    for results in series.values():
        results.sort(key=lambda result: getattr(result.case, axis))
    return series


def _draw(axes: Any, plot: Plot, series: dict[str, list[CaseResult]]) -> None:
    styles = _SECONDS if plot.y == "seconds" else _SPEEDUP
    lines = _seconds if plot.y == "seconds" else _speedups
    drawn = set()
    for number, (name, results) in enumerate(series.items()):
        axes.plot([], [], color=f"C{number % 10}", linewidth=4, label=name)
        for what, points in lines(results, plot.x):
            if points:
                axes.plot(*zip(*points, strict=True), styles[what], color=f"C{number % 10}")
                drawn.add(what)
    for what, style in styles.items():
        if what in drawn:
            axes.plot([], [], style, color="black", label=what)
    if plot.y == "speedup":
        axes.axhline(1, color="gray", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel=plot.label)
    axes.set_ylabel("seconds a call" if plot.y == "seconds" else "speed-up")
    ticks = sorted({getattr(r.case, plot.x) for results in series.values() for r in results})
    if len(ticks) <= _MOST_TICKS:
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=7)


def _seconds(results: list[CaseResult], axis: str) -> Iterator[tuple[str, Points]]:
    def points(name_of: Any) -> Points:
        named = [(result, name_of(result)) for result in results]
        return [
            (getattr(result.case, axis), result.timings[name].median)
            for result, name in named
            if name in result.timings
        ]

    yield OURS, points(lambda result: OURS)
    yield "best dense", points(lambda result: result.best_dense)
    for other in ("experts", "published"):
        yield other, points(lambda result, other=other: other)
    yield "floor", [(getattr(result.case, axis), result.floor) for result in results]


def _speedups(results: list[CaseResult], axis: str) -> Iterator[tuple[str, Points]]:
    measured, possible = [], []
    for result in results:
        if result.speedup is None or result.best_dense is None:
            continue
        x = getattr(result.case, axis)
        measured.append((x, result.speedup))
        possible.append((x, result.timings[result.best_dense].median / result.floor))
    yield "over the best dense layer", measured
    yield "if at the floor", possible
