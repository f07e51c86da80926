"""Runs what is missing of an experiment, each run in a process of its own with one thread."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from datetime import datetime, timezone
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.machine import Machine

from .experiment import Cell, Experiment, Figures, read
from .results import Record
from .settings import as_json

Run = tuple[Cell, int]  # and a seed


def missing(experiment: Experiment, cells: list[Cell], seeds: int, folder: Path) -> list[Run]:
    """Seed after seed, so that an interrupted experiment has some of every cell."""
    done = read(experiment.path(folder))
    return [
        (cell, seed)
        for seed in range(seeds)
        for cell in cells
        if not any(record.seed == seed and cell.fits(record) for record in done)
    ]


def run(experiment: Experiment, cells: list[Cell], seeds: int, jobs: int, folder: Path) -> int:
    """Appends every run's record when it ends; returns the number of runs that failed."""
    todo = missing(experiment, cells, seeds, folder)
    total, failures = len(cells) * seeds, 0
    executor = ThreadPoolExecutor(jobs)
    try:
        futures: dict[Future[Record], Run] = {
            executor.submit(_record, experiment.run, cell, seed): (cell, seed)
            for cell, seed in todo
        }
        done = total - len(todo)
        with tqdm(total=total, initial=done, desc=experiment.name, unit="run") as progress:
            for future in as_completed(futures):
                cell, seed = futures[future]
                try:
                    future.result().append_to(experiment.path(folder))
                except RuntimeError as error:
                    failures += 1
                    progress.write(f"{cell.name}, seed {seed}: {error}", file=sys.stderr)
                progress.set_postfix_str(cell.name)
                progress.update()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
    return failures


def _record(function: Callable[[Any, int], Figures], cell: Cell, seed: int) -> Record:
    begin = time.perf_counter()
    figures = in_process(function, cell.settings, seed)
    return Record(
        cell=cell.name,
        settings=as_json(cell.settings),
        seed=seed,
        figures=figures,
        seconds=round(time.perf_counter() - begin, 2),
        torch=torch.__version__,
        cpu=Machine.here().processor,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def in_process(function: Callable[[Any, int], Figures], settings: Any, seed: int) -> Figures:
    """function(settings, seed), computed by a new process.

    Raises:
        RuntimeError: it failed, with its traceback, or its process died.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, function, settings, seed)
    process = context.Process(target=_child, args=arguments, daemon=True)
    process.start()
    sender.close()
    try:
        figures, error = receiver.recv()
    except EOFError:
        process.join()
        figures, error = None, f"its process died with exit code {process.exitcode}"
    process.join()
    if error:
        raise RuntimeError(error)
    return figures


def _child(
    sender: Connection, function: Callable[[Any, int], Figures], settings: Any, seed: int
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(seed)
        sender.send((function(settings, seed), None))
    except Exception:
        sender.send((None, traceback.format_exc()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
