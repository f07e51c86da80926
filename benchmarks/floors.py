"""What the machine can do, measured in the same run with torch's own kernels.

The times of a case are read against these, see roofline.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .case import DTYPES

_DRAM_BYTES = 2**28
_GEMM = 1024


@dataclass(frozen=True)
class Floors:
    """flops: by dtype, of the best matrix product.
    read: bytes a second by memory ("L2", "L3", "DRAM"), all threads.
    copy: bytes a second read and written, in DRAM.
    call: seconds of an nn.Module around an 8x8 F.linear.
    """

    flops: dict[str, float]
    read: dict[str, float]
    copy: float
    call: float


def best_of(several: list[Floors]) -> Floors:
    """What was possible at some time during a run: other programs disturb single measurements."""
    return Floors(
        flops={name: max(one.flops[name] for one in several) for name in several[0].flops},
        read={name: max(one.read[name] for one in several) for name in several[0].read},
        copy=max(one.copy for one in several),
        call=min(one.call for one in several),
    )


@torch.inference_mode()
def measure_floors(caches: dict[str, int]) -> Floors:
    sizes = {"L2": caches["L2"] // 2, "L3": caches["L3"] // 2, "DRAM": _dram_bytes(caches)}
    return Floors(
        flops={name: _flops(dtype) for name, dtype in DTYPES.items()},
        read={memory: _read(size) for memory, size in sizes.items()},
        copy=_copy(_dram_bytes(caches)),
        call=_call(),
    )


def _dram_bytes(caches: dict[str, int]) -> int:
    """Enough that most of it is in no cache."""
    return min(max(_DRAM_BYTES, 4 * caches["L3"]), 2**30)


def _flops(dtype: torch.dtype) -> float:
    """Of ATen's product or of oneDNN's with a prepared weight, whichever is better."""
    a = torch.randn(_GEMM, _GEMM, dtype=dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(a, _GEMM)
    pointwise = torch.ops.mkldnn._linear_pointwise
    seconds = min(
        _best(lambda: torch.mm(a, a)),
        _best(lambda: pointwise(a, packed, None, "none", [], "none")),
    )
    return 2 * _GEMM**3 / seconds


def _read(size: int) -> float:
    """Sums of one buffer, over and over in one call, by every thread."""
    buffer = torch.ones(size // 4)
    again = max(1, 2**27 // size)
    rows = buffer.expand(again, -1) if again > 1 else buffer.view(64, -1)
    return again * size / _best(lambda: rows.sum(1))


def _copy(size: int) -> float:
    source = torch.ones(size // 8)
    target = torch.empty_like(source)
    return size / _best(lambda: target.copy_(source))


class SmallestModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight)


def _call() -> float:
    module = SmallestModule()
    x = torch.randn(1, 8)

    def many() -> None:
        for _ in range(1000):
            module(x)

    return _best(many) / 1000


def _best(call: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls: floors are what is possible."""
    call()
    seconds = []
    for _ in range(7):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
