"""The most telling cases come first: a run with little time ends before the last."""

from typing import Any

from ..case import Case
from .suite import GPU_DENSE, Plot, Suite

NAME = "gpu-forward"
FAST = ("dense-eager", "dense-cublaslt")
OTHERS = ("masked", "batched", "naive")
WIDE = ((1024, 12), (4096, 13), (12288, 15))  # width and depth, the last those of GPT-3


def _case(tokens: int, depth: int = 11, trees: int = 1, width: int = 768, **more: Any) -> Case:
    defaults = {"dtype": "bfloat16", "baselines": FAST}
    widths = {"input_width": width, "output_width": width}
    return Case(NAME, depth, tokens, trees, device="cuda", **widths, **(defaults | more))


def _cases() -> list[Case]:
    # Compiling takes as long as all else: where it matters most.
    compiled = (16384, 1)
    cases = [_case(tokens, baselines=GPU_DENSE) for tokens in compiled]
    cases += [_case(tokens, depth, width=width) for width, depth in WIDE for tokens in (1, 4096)]
    cases += [_case(tokens) for tokens in (16, 256, 4096, 65536)]
    leaves = {"leaf_width": 32, "baselines": (*FAST, "experts")}
    cases += [_case(tokens, depth=7, **leaves) for tokens in (16384, 1, 256)]
    for dtype in ("float32", "tf32"):
        cases += [_case(t, dtype=dtype, baselines=(*FAST, *OTHERS)) for t in (16384, 1, 256)]
    forests = ((4, 9), (16, 7), (64, 5))
    cases += [_case(tokens, depth, trees) for tokens in (16384, 64) for trees, depth in forests]
    # Weights that do not stay in the L2 cache.
    return cases + [_case(tokens, layers=12) for tokens in (1, 16)]


SUITE = Suite(
    NAME,
    "How much faster is inference on a GPU, from one token to many?",
    tuple(_cases()),
    (Plot("tokens", "speedup", "tokens"),),
)
