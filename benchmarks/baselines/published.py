"""The PyPI package fastfeedforward: a loop over leaves in training, over tokens in inference."""

from __future__ import annotations

from torch import Tensor, nn

from ..case import SOFT, TRAINING, Case
from ..layers import Layer

_MOST_LEAVES = 128


def build(case: Case, layer: Layer, x: Tensor) -> nn.Module:
    import fastfeedforward  # type: ignore[import-untyped]  # an optional dependency

    published: nn.Module = fastfeedforward.FFF(
        case.input_width, case.leaf_width, case.output_width, case.depth
    )
    published.load_state_dict(layer.published_state_dict())
    return published.train(case.step == TRAINING)


def needs(case: Case) -> int:
    """In training it keeps every leaf's output for every token, several times."""
    outputs = case.tokens * case.leaves * case.output_width * case.itemsize
    return 2 * case.weight_bytes + (4 * outputs if case.step == TRAINING else 0)


def unfit(case: Case) -> str:
    if not case.leaf_width or case.trees > 1 or case.depth == 0:
        return "it has one tree of leaf networks, of depth 1 at least"
    if case.dtype != "float32":
        return "it computes in float32 only"
    if case.step == TRAINING and case.routing != SOFT:
        return "its hard training gives routing no gradient"
    if case.step == TRAINING and case.leaves > _MOST_LEAVES:
        return "minutes a step: its backward copies all outputs of all leaves once per leaf"
    return ""
