"""Alternating measurements, reported as median and quartiles."""

from __future__ import annotations

import gc
import math
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Call = Callable[[Any], object]
Clock = Callable[[Sequence[tuple[Call, Any]]], float]


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    rounds: turns of a contender; fewer where they would take longer than ``budget`` seconds.
    turn: seconds of a turn, if a call is not longer.
    limit: a contender one of whose calls takes more seconds is skipped.
    """

    rounds: int
    turn: float
    budget: float
    limit: float


FULL = Effort(rounds=15, turn=0.05, budget=30.0, limit=30.0)
GPU = Effort(rounds=9, turn=0.01, budget=1.0, limit=2.0)
QUICK = Effort(rounds=5, turn=0.005, budget=1.0, limit=2.0)
_FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median and quartiles over the rounds.

    calls: per round.
    faults: page faults per call, at best 0 (see malloc.py).
    peak_bytes: growth of memory during a call, where it was measured.
    graph: whether the calls were those of a CUDA graph.
    """

    median: float
    low: float
    high: float
    rounds: int
    calls: int
    faults: float
    peak_bytes: int | None = None
    graph: bool = False


def wall(sequence: Sequence[tuple[Call, Any]]) -> float:
    """Seconds that the calls take."""
    begin = time.perf_counter()
    for call, argument in sequence:
        call(argument)
    return time.perf_counter() - begin


@dataclass
class _Contender:
    """Turns of one contender: ``calls`` (several layers) and ``inputs`` are cycled through."""

    calls: Sequence[Call]
    inputs: Sequence[Any]
    clock: Clock
    repeats: int = 0
    every: int = 1
    position: int = 0

    def turn(self, repeats: int) -> float:
        """Seconds per call over so many calls."""
        sequence = [
            (self.calls[i % len(self.calls)], self.inputs[i % len(self.inputs)])
            for i in range(self.position, self.position + repeats)
        ]
        self.position += repeats
        return self.clock(sequence) / repeats

    def settle(self) -> float:
        """Warm up until calls need no new memory, for a second at most; seconds of the fastest."""
        fastest, spent, quiet = math.inf, 0.0, 0
        while quiet < 3 and spent < 1.0:
            before = _faults()
            seconds = self.turn(len(self.calls))
            fastest = min(fastest, seconds)
            spent += seconds * len(self.calls)
            quiet = 0 if _faults() > before else quiet + 1
        return fastest

    def plan(self, seconds: float, effort: Effort) -> None:
        cycle = len(self.calls)
        if seconds < effort.turn:  # one call is a poor guide to a short time
            few = cycle * max(1, math.ceil(effort.turn / 10 / seconds / cycle))
            seconds = min(self.turn(few) for _ in range(3))
        self.repeats = cycle * max(1, math.ceil(effort.turn / seconds / cycle))
        affordable = int(effort.budget / (seconds * self.repeats))
        rounds = min(effort.rounds, max(_FEWEST_ROUNDS, affordable))
        self.every = effort.rounds // rounds


def measure(
    contenders: dict[str, Sequence[Call]],
    inputs: Sequence[Any],
    effort: Effort,
    clock: Clock = wall,
) -> dict[str, Timing | str]:
    """A timing each, or the reason why there is none. ``clock`` tells the seconds of some calls.

    The contenders take turns, in both directions alternately, so that what disturbs the machine
    disturbs all of them. Each starts its turn with an untimed cycle of calls if it has many.
    """
    outcomes: dict[str, Timing | str] = {}
    running: dict[str, _Contender] = {}
    for name, calls in contenders.items():
        contender = _Contender(calls, inputs, clock)
        seconds = contender.settle()
        if seconds > effort.limit:
            outcomes[name] = f"a call takes {seconds:.1f} s, the limit is {effort.limit:g} s"
            continue
        contender.plan(seconds, effort)
        running[name] = contender
    seconds_of: dict[str, list[float]] = {name: [] for name in running}
    faults_of = dict.fromkeys(running, 0)
    gc.collect()
    gc.disable()
    try:
        for turn in range(effort.rounds):
            order = list(running.items())
            for name, contender in order if turn % 2 else reversed(order):
                if turn % contender.every:
                    continue
                if contender.repeats > 2 * len(contender.calls):
                    contender.turn(len(contender.calls))
                before = _faults()
                seconds_of[name].append(contender.turn(contender.repeats))
                faults_of[name] += _faults() - before
    finally:
        gc.enable()
    for name, contender in running.items():
        outcomes[name] = _summary(seconds_of[name], contender.repeats, faults_of[name])
    return {name: outcomes[name] for name in contenders}


def _summary(seconds: list[float], calls: int, faults: int) -> Timing:
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    rounds = len(seconds)
    return Timing(median, low, high, rounds, calls, faults / (rounds * calls))


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
