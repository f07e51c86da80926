"""The language models with twice the steps: what becomes of the order when all have seen more?"""

from __future__ import annotations

from dataclasses import replace

from . import language_model
from .experiment import Cell

STEPS = 4800
NAMES = (
    language_model.NARROW,
    language_model.WIDE,
    "FFF l=27 d=5, shared base",
    "balanced tree l=27 d=5, shared base",
    "FFF l=59 d=4, shared base",
    "top-1 of 32 experts of 32",
)

EXPERIMENT = replace(
    language_model.EXPERIMENT,
    name="language_model_long",
    question=f"The blocks of the small language model after {STEPS:,} steps instead of "
    f"{language_model.Settings.steps:,}.",
    cells=tuple(Cell(name, replace(language_model.CELLS[name], steps=STEPS)) for name in NAMES),
)
