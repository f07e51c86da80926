"""The most telling cases come first: a run with little time ends before the last."""

from typing import Any

from ..case import NONE, SOFT, STRAIGHT_THROUGH, TRAINING, Case
from .suite import GPU_DENSE, Plot, Suite

NAME = "gpu-training"
EXACT = ("float32", "tf32")


def _case(tokens: int, depth: int = 11, width: int = 768, **more: Any) -> Case:
    defaults = {"dtype": "bfloat16", "routing": NONE, "baselines": ("dense-eager",)}
    widths = {"input_width": width, "output_width": width}
    return Case(NAME, depth, tokens, step=TRAINING, device="cuda", **widths, **(defaults | more))


def _cases() -> list[Case]:
    leaves = {"depth": 7, "leaf_width": 32}
    soft = leaves | {"routing": SOFT, "memory": True}
    straight = {"routing": STRAIGHT_THROUGH}
    return [
        _case(16384, baselines=GPU_DENSE),
        _case(16384, **straight),
        _case(16384, **soft, baselines=GPU_DENSE),
        _case(16384, **leaves, **straight, baselines=("dense-eager", "experts")),
        _case(4096, 15, 12288),
        *(_case(tokens) for tokens in (1024, 65536)),
        *(_case(tokens, **straight) for tokens in (1024, 65536)),
        *(_case(16384, dtype=d, baselines=("dense-eager", "masked", "batched")) for d in EXACT),
        *(_case(16384, dtype=dtype, **straight) for dtype in EXACT),
        *(_case(16384, dtype=dtype, **soft) for dtype in EXACT),
        *(_case(4096, depth, width) for width, depth in ((1024, 12), (4096, 13))),
    ]


SUITE = Suite(
    NAME,
    "How much faster is a training step on a GPU?",
    tuple(_cases()),
    (Plot("tokens", "speedup", "tokens"),),
)
