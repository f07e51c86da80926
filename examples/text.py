"""The language models' text: bytes of the Python standard library's sources, or of a folder."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT = 10  # every tenth file is for validation
LEAST = 10_000  # bytes


@dataclass(frozen=True)
class Text:
    """Bytes, uint8; validation is of other files than training."""

    name: str
    training: Tensor
    validation: Tensor


def load(folder: Path | None) -> Text:
    """All text files below ``folder``, by default the standard library's."""
    if folder is None:
        library = Path(sysconfig.get_path("stdlib"))
        files = [
            file
            for file in library.rglob("*.py")
            if not {"site-packages", "dist-packages", "test", "tests"} & set(file.parts)
        ]
        name = "Python's standard library"
    else:
        files = [file for file in folder.rglob("*") if file.is_file()]
        name = str(folder)
    contents = [content for file in sorted(files) if (content := as_text(file))]
    validation = b"".join(contents[::HELD_OUT])
    training = b"".join(content for i, content in enumerate(contents) if i % HELD_OUT)
    if min(len(training), len(validation)) < LEAST:
        raise SystemExit(f"{name}: too little text: expected {LEAST:,} bytes for each split")
    return Text(name, as_tensor(training), as_tensor(validation))


def as_text(file: Path) -> bytes:
    """Its bytes, or none if it is no text."""
    try:
        content = file.read_bytes()
        content.decode()
    except (OSError, UnicodeDecodeError):
        return b""
    return content if b"\0" not in content else b""


def as_tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def windows(part: Tensor, count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """``count`` random windows [count, length], and each byte's next one; int64."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(part) - length, (count, 1), generator=generator)
    window = part[starts + torch.arange(length + 1)].long()
    return window[:, :-1], window[:, 1:]
