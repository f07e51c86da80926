"""The allocator's policy during measurements.

glibc gives large blocks back to the kernel as soon as they are freed, so that every call whose
output is large pays the page faults of new memory: several times the layer's own time, and the
same for every contender, which hides what is to be seen. Long-running programs keep their memory.
So the benchmarks run with an allocator that keeps it, for all contenders alike; glibc reads these
settings at start-up only, hence the second start.
"""

from __future__ import annotations

import os
import sys

_HUGE = str(2**40)
KEEP = {
    "MALLOC_MMAP_THRESHOLD_": _HUGE,  # large blocks come from the heap,
    "MALLOC_TRIM_THRESHOLD_": _HUGE,  # which never shrinks
    "MALLOC_TOP_PAD_": str(2**28),  # and grows in large steps
}


def keeps_memory() -> bool:
    return all(os.environ.get(name) == value for name, value in KEEP.items())


def restart_with_kept_memory() -> None:
    """Start this very program anew, unless it already runs so."""
    if not keeps_memory():
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **KEEP})
