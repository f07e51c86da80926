"""Numbers as people read them, and Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable


def seconds(value: float) -> str:
    """Three digits with the fitting unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{digits(value / size)} {unit}"
    return f"{digits(value / 1e-9)} ns"


def digits(value: float) -> str:
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(value: float) -> str:
    return f"{digits(value)}x"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table; numbers, in all columns but the first, are aligned to the right."""
    rules = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rules, *rows))


def into_markers(document: str, text_of: Callable[[str], str]) -> str:
    """Replace what is between ``<!-- begin: NAME -->`` and ``<!-- end: NAME -->``.

    Where there is no text for a name, what stands there stays.
    """

    def replaced(match: re.Match[str]) -> str:
        text = text_of(match["name"])
        return f"{match['begin']}\n{text}\n{match['end']}" if text else match[0]

    pattern = r"(?P<begin><!-- begin: (?P<name>\S+) -->).*?(?P<end><!-- end: (?P=name) -->)"
    return re.sub(pattern, replaced, document, flags=re.DOTALL)
