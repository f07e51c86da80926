"""The paper's CPU table tells implementations apart by the level of BLAS they use. Restated:

- level 1, vectors: "dense-vectors", a token by multiplying and adding vectors;
- level 2, matrix times vector: the other dense baselines at one token;
- level 3, matrix times matrix: the dense baselines at 128 tokens.

The tree is the same op throughout, and what is claimed is its ratio to the fastest dense layer,
whatever the level. Dense layers have 4095 neurons, as the tree, or BERT's own 3072.
"""

from ..case import Case
from .suite import DENSE, Plot, Suite

NAME = "paper-2311.10770"
_OTHERS = ("masked", "batched")
_GPT3 = 12288


def _cases() -> list[Case]:
    cases = []
    for tokens in (1, 128):
        vectors = ("dense-vectors",) if tokens == 1 else ()
        for dense_width in (0, 3072):
            baselines = (*DENSE, *vectors, *_OTHERS)
            cases.append(Case(NAME, 11, tokens, dense_width=dense_width, baselines=baselines))
    for dtype in ("bfloat16", "float32"):
        for tokens in (1, 128):
            # In float32 each layer has 6.4 GB of weights: the strongest dense one comes first.
            cases.append(
                Case(
                    NAME,
                    15,
                    tokens,
                    input_width=_GPT3,
                    output_width=_GPT3,
                    dtype=dtype,
                    baselines=("dense-onednn", "dense-eager"),
                )
            )
    return cases


SUITE = Suite(
    NAME,
    "UltraFastBERT's CPU table: 1x11 (12 of 4095 neurons); and GPT-3's scale (16 of 65,535).",
    tuple(_cases()),
    (Plot("tokens", "speedup", "tokens"),),
)
