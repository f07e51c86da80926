"""Cases on a GPU: settings, inputs, CUDA graphs, events, and what the GPU can do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .case import GPU_DTYPES, Case
from .floors import Floors, SmallestModule
from .machine import Machine
from .timing import Call

_FEWEST_INPUTS, _MOST_INPUTS = 3, 64
_WARM_UP = 3
_PRODUCT = 8192


def is_available() -> bool:
    return torch.cuda.is_available()


@contextmanager
def settings(case: Case) -> Iterator[None]:
    """What a case makes lies on its device, and its products use TF32 if it says so."""
    if case.device == "cpu":
        yield
        return
    try:
        with torch.device(case.device), tf32(case.dtype == "tf32"):
            yield
    finally:
        torch.cuda.empty_cache()


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def input_count(case: Case, machine: Machine) -> int:
    """So many inputs that together they do not fit into the L2 cache; within limits."""
    size = case.tokens * (case.input_width + case.output_width) * case.itemsize
    wanted = -(-2 * machine.caches["L2"] // size)
    return max(_FEWEST_INPUTS, min(_MOST_INPUTS, wanted))


def events(sequence: Sequence[tuple[Call, Any]]) -> float:
    """Seconds that the GPU takes for the calls, waiting for their launches included."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for call, argument in sequence:
        call(argument)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def record(calls: Sequence[Call], inputs: Sequence[Any]) -> tuple[Call, int]:
    """One CUDA graph of calls with all inputs in turn, to be replayed, and how many calls it has.

    Raises what CUDA raises where a call cannot be recorded, because it waits for the GPU.
    """
    count = max(len(calls), len(inputs))
    sequence = [(calls[i % len(calls)], inputs[i % len(inputs)]) for i in range(count)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call, argument in [*sequence[: len(calls)], *sequence[:1] * _WARM_UP]:
            call(argument)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call, argument in sequence:
            call(argument)
    return lambda argument: graph.replay(), count


def machine() -> Machine:
    """The GPU in the terms of a machine: its multiprocessors are its cores."""
    properties = torch.cuda.get_device_properties(0)
    return Machine(
        processor=properties.name,
        cores=properties.multi_processor_count,
        capability=f"sm_{properties.major}{properties.minor}",
        caches={"L2": properties.L2_cache_size},
        memory=properties.total_memory,
    )


@torch.inference_mode()
def measure_floors(machine: Machine) -> Floors:
    """As :func:`floors.measure_floors`; a call is the smallest module's in a CUDA graph."""
    with torch.device("cuda"):
        sizes = {"L2": machine.caches["L2"] // 4, "DRAM": min(2**32, machine.memory // 8)}
        return Floors(
            flops={name: _flops(name, dtype) for name, dtype in GPU_DTYPES.items()},
            read={memory: _read(size) for memory, size in sizes.items()},
            copy=_copy(sizes["DRAM"]),
            call=_best(SmallestModule(), torch.randn(1, 8)),
        )


def _flops(name: str, dtype: torch.dtype) -> float:
    a = torch.randn(_PRODUCT, _PRODUCT, dtype=dtype)
    with tf32(name == "tf32"):
        return 2 * _PRODUCT**3 / _best(lambda b: torch.mm(a, b), a)


def _read(size: int) -> float:
    """Sums of one buffer, over and over in one call."""
    again = max(1, 2**30 // size)
    rows = torch.ones(size // 4).expand(again, -1)
    return again * size / _best(lambda t: t.sum(1), rows)


def _copy(size: int) -> float:
    source = torch.ones(size // 8)
    return size / _best(torch.empty_like(source).copy_, source)


def _best(call: Callable[[Tensor], object] | nn.Module, argument: Tensor) -> float:
    """Seconds of a call within a graph of several, the fastest of some replays."""
    replay, count = record([call], [argument] * 10)
    return min(events([(replay, None)]) for _ in range(7)) / count
