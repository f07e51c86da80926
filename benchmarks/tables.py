"""Reports as Markdown tables, printed or put between a document's markers."""

from __future__ import annotations

from pathlib import Path

from .case import ModelCase
from .floors import best_of
from .results import DENSE, NO_FEEDFORWARD, OURS, CaseResult, Report
from .suites import SUITES
from .suites.suite import NARROW
from .text import digits, into_markers, markdown, ratio, seconds

_MACHINES = {"machine": "cpu", "gpu-machine": "cuda"}  # places in a document
_DISTILBERT = ("distilbert", "distilbert-compiled")
_DERIVED = (*DENSE, *NARROW)


def suite_table(name: str, report: Report) -> str:
    """One suite of a report, with where it comes from; "" if the report has none of its cases."""
    results = [result for result in report.cases if result.case.suite == name]
    if not results:
        return ""
    if isinstance(results[0].case, ModelCase):
        table = _models_table(results)
        return "\n".join([_origin(report), "", table, *_left_out(results)])
    others = [
        baseline
        for baseline in dict.fromkeys(b for result in results for b in result.case.baselines)
        if baseline not in _DERIVED
    ]
    narrow = any(set(NARROW) & set(result.case.baselines) for result in results)
    memory = any(result.case.memory for result in results)
    head = ["case", "ours", "best dense", "speed-up", *(["narrow dense"] if narrow else [])]
    head += [*others, "floor", *(["peak memory of dense"] if memory else [])]
    head += ["a token and visited neuron"] if SUITES[name].per_neuron else []
    rows = []
    for result in results:
        case = result.case.name.removeprefix(f"{name}/")
        if result.ours is None:
            rows.append([case, result.error, *[""] * (len(head) - 2)])
            continue
        row = [case, _spread(result), _best_dense(result), _speedup(result)]
        row += [_time(result, result.fastest(NARROW))] if narrow else []
        row += [*(_time(result, other) for other in others), seconds(result.floor)]
        row += [_memory(result)] if memory else []
        row += [_per_neuron(result)] if SUITES[name].per_neuron else []
        rows.append(row)
    return "\n".join([_origin(report), "", markdown(head, rows), *_left_out(results)])


def _models_table(results: list[CaseResult]) -> str:
    others = list(dict.fromkeys(name for r in results for name in r.case.baselines))
    others.remove(NO_FEEDFORWARD)
    head = ["case", "ours", *others, "speed-up over dense", "over DistilBERT"]
    head += ["without feedforward", "share of dense-eager", "limit of the speed-up"]
    rows = []
    for result in results:
        case = result.case.name.removeprefix(f"{result.case.suite}/")
        if result.ours is None:
            rows.append([case, result.error, *[""] * (len(head) - 2)])
            continue
        row = [case, _spread(result), *(_time(result, name) for name in others)]
        row += [_gain(result, DENSE), _gain(result, _DISTILBERT)]
        rows.append([*row, *_limit(result)])
    return markdown(head, rows)


def _gain(result: CaseResult, names: tuple[str, ...]) -> str:
    """Of the fastest form of ours, eager or compiled, over the fastest of ``names``."""
    ours, other = result.fastest((OURS, "ours-compiled")), result.fastest(names)
    if ours is None or other is None:
        return "-"
    return _bold_if_slower(result.timings[other].median / result.timings[ours].median)


def _limit(result: CaseResult) -> list[str]:
    """Time without feedforward blocks, its share, and what trees that cost nothing would gain."""
    rest, dense = (result.timings.get(name) for name in (NO_FEEDFORWARD, "dense-eager"))
    if rest is None or dense is None:
        return ["-", "-", "-"]
    share = rest.median / dense.median
    return [seconds(rest.median), f"{100 * share:.0f} %", ratio(1 / share)]


def put_into(document: str, reports: list[Report]) -> str:
    """Fill the places of the suites, and those of the machines' floors."""

    def text_of(name: str) -> str:
        if name in _MACHINES:
            own = [report for report in reports if report.device == _MACHINES[name]]
            return machine_table(own) if own else ""
        tables = [suite_table(name, report) for report in reports]
        return "\n\n".join(table for table in tables if table)

    return into_markers(document, text_of)


def print_tables(paths: list[Path], into: Path | None) -> int:
    reports = [Report.load(path) for path in paths]
    if into:
        into.write_text(put_into(into.read_text(), reports))
        return 0
    for name, device in _MACHINES.items():
        own = [report for report in reports if report.device == device]
        if own:
            print(f"### {name}\n\n{machine_table(own)}\n")
    for suite in SUITES.values():
        for report in reports:
            table = suite_table(suite.name, report)
            if table:
                print(f"### {suite.name}\n\n{suite.question}\n\n{table}\n")
    return 0


def machine_table(reports: list[Report]) -> str:
    """The machines' floors, the best of each run."""
    first = reports[0].floors[0]
    head = ["machine", *(f"{dtype} product, GF/s" for dtype in first.flops)]
    head += [*(f"{memory} read, GB/s" for memory in first.read), "copy, GB/s", "call of a module"]
    rows = []
    for report in reports:
        floors = best_of(report.floors)
        rates = [*floors.flops.values(), *floors.read.values(), floors.copy]
        row = [_machine(report), *(digits(rate / 1e9) for rate in rates), seconds(floors.call)]
        rows.append(row)
    return markdown(head, rows)


def _machine(report: Report) -> str:
    machine = report.machine
    return f"{machine.processor}, {machine.capability}, {report.threads} threads"


def _origin(report: Report) -> str:
    torch = f"torch {report.versions['torch']}"
    malloc = "" if report.malloc == "kept" else ", system malloc"
    quick = " **A quick run: not for quoting.**" if report.quick else ""
    where = f"{_machine(report)}, {torch}{malloc}, {report.date[:10]}"
    return f"{where}: `{report.command}`{quick}"


def _left_out(results: list[CaseResult]) -> list[str]:
    """Why baselines are missing, one line for all cases with one reason."""
    cases_of: dict[str, int] = {}
    for result in results:
        for name, reason in result.skipped.items():
            text = f"{name}: {reason}"
            cases_of[text] = cases_of.get(text, 0) + 1
    lines = [f"- left out in {count} of the cases: {text}" for text, count in cases_of.items()]
    return ["", *lines] if lines else []


def _spread(result: CaseResult) -> str:
    timing = result.timings[OURS]
    share = (timing.high - timing.low) / 2 / timing.median
    return f"{seconds(timing.median)} ± {100 * share:.0f} %"


def _best_dense(result: CaseResult) -> str:
    name = result.best_dense
    return f"{_time(result, name)} ({name.removeprefix('dense-')})" if name else "-"


def _speedup(result: CaseResult) -> str:
    return "-" if result.speedup is None else _bold_if_slower(result.speedup)


def _bold_if_slower(speedup: float) -> str:
    return ratio(speedup) if speedup >= 1 else f"**{ratio(speedup)}, slower**"


def _time(result: CaseResult, name: str | None) -> str:
    timing = result.timings.get(name) if name else None
    return seconds(timing.median) if timing else "-"


def _per_neuron(result: CaseResult) -> str:
    case = result.case
    return seconds(result.timings[OURS].median / (case.tokens * case.visited))


def _memory(result: CaseResult) -> str:
    dense = result.timings.get("dense-eager")
    ours = result.timings[OURS].peak_bytes
    if ours is None or dense is None or not dense.peak_bytes:
        return "-"
    sizes = f"{ours / 2**20:.0f} / {dense.peak_bytes / 2**20:.0f} MiB"
    return f"{ratio(ours / dense.peak_bytes)} ({sizes})"
