"""``python -m benchmarks``, from the repository's root."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from .malloc import restart_with_kept_memory


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = main.add_subparsers(dest="command", required=True)

    listing = commands.add_parser("list", help="suites, cases and baselines")
    run = commands.add_parser("run", help="measure, and write a JSON report")
    for command in (listing, run):
        command.add_argument(
            "patterns", nargs="*", help="suites, globs or parts of case names; default: all"
        )
    run.add_argument("--quick", action="store_true", help="short turns, nothing compiled")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="whose cases")
    run.add_argument(
        "--seconds", type=float, default=math.inf, help="after which no other case is begun"
    )
    run.add_argument("--threads", type=int, default=0, help="default: torch's own choice")
    run.add_argument("--skip", action="append", default=[], help="a baseline to leave out")
    run.add_argument("--out", type=Path, help="default: benchmarks/results/DATE-TIME.json")
    run.add_argument(
        "--system-malloc",
        action="store_true",
        help="let the allocator return large blocks to the system, see malloc.py",
    )

    compare = commands.add_parser("compare", help="exit status 1 if a case got slower")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)
    compare.add_argument(
        "--tolerance", type=float, default=0.05, help="growth that is no regression"
    )

    table = commands.add_parser("table", help="Markdown tables")
    table.add_argument("reports", type=Path, nargs="+")
    table.add_argument("--into", type=Path, help="put them between this document's markers")

    plot = commands.add_parser("plot", help="PNG plots")
    plot.add_argument("reports", type=Path, nargs="+")
    plot.add_argument("--out", type=Path, help="directory; default: that of the first report")

    kernels = commands.add_parser("kernels", help="CUDA kernels; exit status 1 if one spills")
    kernels.add_argument("library", type=Path, help="libtorch_fff.so of a CUDA build")
    kernels.add_argument("--into", type=Path, help="put the table between this document's markers")
    return main


def main() -> int:
    arguments = parser().parse_args()
    try:
        return dispatch(arguments)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2


def dispatch(arguments: argparse.Namespace) -> int:
    # Imports wait until they are needed: only ``list`` and ``run`` need torch_fff.
    if arguments.command == "list":
        from .commands import list_cases

        return list_cases(arguments.patterns)
    if arguments.command == "run":
        if not arguments.system_malloc:
            restart_with_kept_memory()
        from .commands import default_out, run

        out = arguments.out or default_out()
        return run(
            arguments.patterns,
            arguments.quick,
            arguments.threads,
            arguments.skip,
            out,
            arguments.device,
            arguments.seconds,
        )
    if arguments.command == "compare":
        from .compare import compare_files

        return compare_files(arguments.before, arguments.after, arguments.tolerance)
    if arguments.command == "table":
        from .tables import print_tables

        return print_tables(arguments.reports, arguments.into)
    if arguments.command == "kernels":
        from .kernels import report_kernels

        return report_kernels(arguments.library, arguments.into)
    from .plots import plot_files

    for path in plot_files(arguments.reports, arguments.out or arguments.reports[0].parent):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
