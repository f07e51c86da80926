"""The registry: every suite by name, every case in one of them."""

from __future__ import annotations

from fnmatch import fnmatchcase

from ..case import Case, ModelCase
from . import (
    bert,
    depth,
    forward,
    gpu_forward,
    gpu_training,
    leaves,
    paper_2308_14711,
    paper_2311_10770,
    prune,
    soft,
    training,
    trees,
)
from .suite import Plot, Suite

_MODULES = (
    forward,
    training,
    depth,
    trees,
    leaves,
    soft,
    prune,
    paper_2311_10770,
    paper_2308_14711,
    bert,
    gpu_forward,
    gpu_training,
)
SUITES: dict[str, Suite] = {module.SUITE.name: module.SUITE for module in _MODULES}

__all__ = ["SUITES", "Plot", "Suite", "select"]


def select(patterns: list[str]) -> list[Case | ModelCase]:
    """Cases whose suite is named, or whose name fits as a glob or contains the pattern.

    All cases if there is no pattern.
    """

    def wanted(case: Case | ModelCase) -> bool:
        return not patterns or any(
            case.suite == pattern
            or fnmatchcase(case.name, pattern)
            or (pattern not in SUITES and pattern in case.name)
            for pattern in patterns
        )

    return [case for suite in SUITES.values() for case in suite.cases if wanted(case)]
