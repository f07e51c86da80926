"""The learning rate's course."""

from __future__ import annotations

import math


def warm_cosine(step: int, steps: int) -> float:
    """Share of the highest rate: up to it within 3 % of the steps, then along a cosine to 0."""
    return min(1.0, (step + 1) / (0.03 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
