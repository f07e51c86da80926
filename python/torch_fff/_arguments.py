"""Checks of arguments. A failed one is a ValueError that names owner, argument, expected, got."""

from __future__ import annotations

from numbers import Integral, Real
from typing import NoReturn


def reject(owner: str, argument: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"{owner}: {argument}: expected {expected}, got {got!r}")


def check_count(owner: str, argument: str, value: object, minimum: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < minimum:
        reject(owner, argument, f"an integer >= {minimum}", value)


def check_number(
    owner: str, argument: str, value: object, low: float = 0.0, high: float = float("inf")
) -> None:
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= float(value) <= high:
        reject(owner, argument, f"a number in [{low:g}, {high:g}]", value)


def check_choice(owner: str, argument: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        reject(owner, argument, "one of " + ", ".join(map(repr, choices)), value)
