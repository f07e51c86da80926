"""``python -m experiments``, from the repository's root."""

from __future__ import annotations

import argparse
import ast
import os
import sys
from pathlib import Path
from typing import Any

from .experiment import Experiment
from .registry import EXPERIMENTS
from .results import FOLDER
from .runner import run


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    commands = main.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="experiments and their cells")
    running = commands.add_parser("run", help="compute what is missing, then table and plot")
    table = commands.add_parser("table", help="Markdown of the results there are")
    plot = commands.add_parser("plot", help="PNG of the results there are")
    for command in (running, table, plot):
        command.add_argument("name", choices=EXPERIMENTS)
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="SETTING=VALUE",
            help="change a setting of all cells, such as epochs=2; results of other settings stay",
        )
        command.add_argument("--out", type=Path, default=FOLDER, help=f"default: {_shown(FOLDER)}")
    running.add_argument("--seeds", type=int, help="default: the experiment's, mostly 5")
    running.add_argument("--jobs", type=int, default=_cores(), help="at once; default: cores")
    running.add_argument("--only", metavar="PATTERN", help="part of a cell's name, or a glob")
    return main


def main() -> int:
    arguments = parser().parse_args()
    try:
        return dispatch(arguments)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2


def dispatch(arguments: argparse.Namespace) -> int:
    if arguments.command == "list":
        list_experiments()
        return 0
    changes = dict(setting(text) for text in arguments.set)
    experiment = EXPERIMENTS[arguments.name].with_settings(changes)
    failures = 0
    if arguments.command == "run":
        seeds = experiment.seeds if arguments.seeds is None else arguments.seeds
        for option, count in (("--seeds", seeds), ("--jobs", arguments.jobs)):
            if count < 1:
                raise ValueError(f"{option}: expected at least 1, got {count}")
        cells = experiment.select(arguments.only)
        failures = run(experiment, cells, seeds, arguments.jobs, arguments.out)
    show(experiment, arguments.command, arguments.out)
    return 1 if failures else 0


def list_experiments() -> None:
    for experiment in EXPERIMENTS.values():
        print(f"{experiment.name}: {experiment.question}")
        print("".join(f"    {cell.name}\n" for cell in experiment.cells))


def show(experiment: Experiment, command: str, out: Path) -> None:
    """``run`` ends with both."""
    results = experiment.results(out)
    if command in ("run", "table"):
        text = f"# {experiment.name}\n\n{experiment.question}\n\n{experiment.table(results)}\n"
        path = experiment.path(out).with_suffix(".md")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(text)
    if command in ("run", "plot"):
        path = experiment.path(out).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        experiment.plot(results, path)
        print(_shown(path))


def setting(text: str) -> tuple[str, Any]:
    """ "epochs=2" -> ("epochs", 2)"""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set: expected SETTING=VALUE, got {text}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _shown(path: Path) -> str:
    return os.path.relpath(path)


if __name__ == "__main__":
    sys.exit(main())
