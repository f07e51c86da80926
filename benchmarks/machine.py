"""What the measurements ran on."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_PARTS = ("type", "level", "size")
_TYPICAL_CACHES = {"L1": 2**15, "L2": 2**20, "L3": 2**25}  # where a virtual machine tells nothing


@dataclass(frozen=True)
class Machine:
    """caches: bytes by level ("L1", "L2", "L3"), as one core sees them."""

    processor: str
    cores: int
    capability: str
    caches: dict[str, int]
    memory: int

    @staticmethod
    def here() -> Machine:
        return Machine(
            processor=_processor(),
            cores=len(os.sched_getaffinity(0)),
            capability=torch.backends.cpu.get_cpu_capability(),
            caches=_caches(),
            memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        )


def _processor() -> str:
    match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return match[1] if match else "unknown"


def _caches() -> dict[str, int]:
    caches = dict(_TYPICAL_CACHES)
    for cache in sorted(_CACHES.glob("index*")):
        kind, level, size = ((cache / part).read_text().strip() for part in _PARTS)
        if kind != "Instruction":
            caches[f"L{level}"] = int(size.removesuffix("K")) * 1024
    return caches
