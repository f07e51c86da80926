from ..case import Case
from .suite import Plot, Suite

NAME = "paper-2308.14711"
LEAF_WIDTH = 32

SUITE = Suite(
    NAME,
    "FFF's figures: inference time against training width, up to 2^15 leaves of 32 neurons.",
    tuple(
        Case(
            NAME,
            depth,
            256,
            leaf_width=LEAF_WIDTH,
            # At a million neurons not all fit into memory: the strongest dense one comes first.
            baselines=("experts", "dense-onednn", "dense-eager", "dense-compiled", "published"),
        )
        for depth in range(1, 16, 2)
    ),
    (Plot("neurons", "seconds", "training width"), Plot("neurons", "speedup", "training width")),
)
