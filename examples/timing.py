"""Time per sample of several layers on the same inputs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

BATCHES = (1, 64, 1024)
ROUNDS = 15
SECONDS_PER_TURN = 3e-3  # long enough for the clock, short enough that turns alternate often
ROTATED_SAMPLES = 2048  # different inputs in turn, so that no layer keeps meeting the same path


@dataclass(frozen=True)
class Block:
    """Layers of one input width that could stand in for each other; `baseline` is one of them."""

    name: str
    width: int
    layers: dict[str, nn.Module]
    baseline: str


@dataclass(frozen=True)
class Timing:
    block: str
    name: str
    mode: str
    batch: int
    microseconds: float


def can_compile() -> bool:
    """torch.compile needs a working C++ compiler; without one the demo goes on in eager mode."""
    try:
        torch.compile(lambda x: (x + 1).relu())(torch.zeros(8))
    except Exception as error:
        print(f"torch.compile does not work here ({type(error).__name__}), so eager only.")
        return False
    return True


@torch.inference_mode()
def time_block(block: Block, mode: str) -> list[Timing]:
    """All layers at every batch size; mode is "eager" or "compiled"."""
    torch.compiler.reset()  # what other blocks compiled would count against the recompile limit
    samples = torch.randn(ROTATED_SAMPLES, block.width)
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        name: torch.compile(layer.eval()) if mode == "compiled" else layer.eval()
        for name, layer in block.layers.items()
    }
    timings = []
    for batch in tqdm(BATCHES, desc=f"{block.name}, {mode}".ljust(31), unit="size", ncols=100):
        for name, seconds in median_seconds(calls, samples.split(batch)).items():
            timings.append(Timing(block.name, name, mode, batch, 1e6 * seconds / batch))
    return timings


def median_seconds(
    calls: dict[str, Callable[[Tensor], Tensor]], inputs: tuple[Tensor, ...]
) -> dict[str, float]:
    """Median seconds of one call of each; the calls alternate so that all meet the same machine."""
    repeats = {name: repeats_per_turn(call, inputs) for name, call in calls.items()}
    turns: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS):
        for name, call in calls.items():
            turns[name].append(one_turn(call, inputs, repeats[name], start=turn * repeats[name]))
    return {name: statistics.median(seconds) for name, seconds in turns.items()}


def repeats_per_turn(call: Callable[[Tensor], Tensor], inputs: tuple[Tensor, ...]) -> int:
    call(inputs[0])  # compiles and warms up
    return max(1, round(SECONDS_PER_TURN / one_turn(call, inputs, repeats=3, start=0)))


def one_turn(
    call: Callable[[Tensor], Tensor], inputs: tuple[Tensor, ...], repeats: int, start: int
) -> float:
    batches = [inputs[(start + i) % len(inputs)] for i in range(repeats)]
    begin = time.perf_counter()
    for batch in batches:
        call(batch)
    return (time.perf_counter() - begin) / repeats
