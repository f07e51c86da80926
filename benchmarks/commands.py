"""What the command line's ``list`` and ``run`` do."""

from __future__ import annotations

import math
import platform
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

import torch_fff

from . import gpu
from .baselines import BASELINES
from .case import Case, ModelCase
from .floors import Floors, best_of, measure_floors
from .machine import Machine
from .malloc import keeps_memory
from .models import CONTENDERS
from .results import CaseResult, Report
from .roofline import floor_seconds
from .runner import Options, run_case
from .suites import SUITES, select
from .text import ratio, seconds
from .timing import FULL, GPU, QUICK

_COMPILED = [name for name in (*BASELINES, *CONTENDERS) if name.endswith("-compiled")]


def list_cases(patterns: list[str]) -> int:
    wanted = {case.name for case in select(patterns)}
    for suite in SUITES.values():
        cases = [case for case in suite.cases if case.name in wanted]
        if cases:
            print(f"{suite.name}: {suite.question}")
            print("".join(f"    {case.name}\n" for case in cases))
    for what, known in (("baselines", BASELINES), ("baselines of whole models", CONTENDERS)):
        print(f"{what}:")
        for name, baseline in known.items():
            print(f"    {name:20} {baseline.summary}")
    return 0


def run(
    patterns: list[str],
    quick: bool,
    threads: int,
    skip: list[str],
    out: Path,
    device: str = "cpu",
    most_seconds: float = math.inf,
) -> int:
    """The exit status: 1 if any case failed. After ``most_seconds`` no other case is begun."""
    begin = time.monotonic()
    cases = [case for case in select(patterns) if case.device == device]
    if quick:
        cases = [case for case in cases if not (isinstance(case, ModelCase) and case.long)]
    if not cases:
        print(f"benchmarks: no case fits {' '.join(patterns)}", file=sys.stderr)
        return 2
    unknown = sorted(set(skip) - set(BASELINES) - set(CONTENDERS))
    if unknown:
        print(f"benchmarks: --skip: no such baseline: {', '.join(unknown)}", file=sys.stderr)
        return 2
    if threads:
        torch.set_num_threads(threads)
    if device == "cuda" and not gpu.is_available():
        print("benchmarks: --device cuda: needs a GPU and a torch with CUDA", file=sys.stderr)
        return 2
    report = _new_report(quick, device)
    options = Options(
        effort=QUICK if quick else FULL if device == "cpu" else GPU,
        # Compiling takes longer than everything else in a quick run.
        skip=frozenset([*skip, *_COMPILED] if quick else skip),
    )
    print(f"{report.machine.processor}, {report.threads} threads, writing {out}")
    report.floors.append(_floors(report))
    floors = report.floors[0]
    for number, case in enumerate(cases, 1):
        if time.monotonic() - begin > most_seconds:
            rest = ", ".join(left.name for left in cases[number - 1 :])
            print(f"left out after {most_seconds:g} s: {rest}")
            break
        result = run_case(case, options)
        if isinstance(case, Case):
            result.floor = floor_seconds(case, floors, report.machine, report.threads)
        report.cases.append(result)
        report.save(out)  # a long run that is interrupted keeps what it has
        print(f"[{number}/{len(cases)}] {_line(case, result)}", flush=True)
    report.floors.append(_floors(report))
    floors = best_of(report.floors)
    for result in report.cases:
        if isinstance(result.case, Case):
            result.floor = floor_seconds(result.case, floors, report.machine, report.threads)
    report.save(out)
    return _conclude(report)


def default_out() -> Path:
    now = datetime.now(timezone.utc)
    return Path(__file__).parent / "results" / f"{now:%Y%m%d-%H%M%S}.json"


def _floors(report: Report) -> Floors:
    if report.device == "cuda":
        return gpu.measure_floors(report.machine)
    return measure_floors(report.machine.caches)


def _new_report(quick: bool, device: str) -> Report:
    return Report(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command="python -m benchmarks " + " ".join(sys.argv[1:]),
        quick=quick,
        malloc="kept" if keeps_memory() else "system",
        threads=torch.get_num_threads(),
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torch_fff": torch_fff.__version__,
        },
        machine=gpu.machine() if device == "cuda" else Machine.here(),
        device=device,
    )


def _line(case: Case | ModelCase, result: CaseResult) -> str:
    if result.ours is None:
        return f"{case.name}: FAILED: {result.error}"
    line = f"{case.name}: {seconds(result.ours.median)}"
    if result.speedup is not None and result.best_dense is not None:
        dense = seconds(result.timings[result.best_dense].median)
        line += f", {result.best_dense} {dense}: {ratio(result.speedup)}"
    return line + (f", floor {seconds(result.floor)}" if result.floor else "")


def _conclude(report: Report) -> int:
    failed = [result.case.name for result in report.cases if result.ours is None]
    slower = [result.case.name for result in report.cases if (result.speedup or 1) < 1]
    for what, names in (("failed", failed), ("slower than the best dense layer", slower)):
        if names:
            print(f"{what}: {', '.join(names)}")
    return 1 if failed else 0
