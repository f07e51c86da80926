"""Real English sentences that every machine with Python has: the standard library's docstrings."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

HELD_OUT = 5  # every fifth file


def read_sentences() -> tuple[list[str], list[str]]:
    """(for calibration, held out): no sentence twice, no file in both, in a fixed random order."""
    seen: set[str] = set()
    calibration: list[str] = []
    held_out: list[str] = []
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        name = file.relative_to(library)
        if {"site-packages", "dist-packages", "test", "tests"} & set(name.parts):
            continue
        split = held_out if zlib.crc32(str(name).encode()) % HELD_OUT == 0 else calibration
        for sentence in _sentences(file):
            if sentence not in seen:
                seen.add(sentence)
                split.append(sentence)
    for split in (calibration, held_out):
        random.Random(0).shuffle(split)
    return calibration, held_out


def _sentences(file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # files that are meant to be broken, such as lib2to3's
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for paragraph in re.split(r"\n\s*\n", ast.get_docstring(node) or ""):
            text = " ".join(paragraph.split())
            if ">>>" not in text and "::" not in text:
                yield from filter(_is_prose, re.split(r"(?<=[.!?])\s+(?=[A-Z])", text))


def _is_prose(sentence: str) -> bool:
    letters = sum(character.isalpha() or character == " " for character in sentence)
    words = len(sentence.split())
    ends = sentence[:1].isupper() and sentence[-1:] in ".!?"
    return ends and 6 <= words <= 60 and letters > 0.9 * len(sentence)
