from ..case import SOFT, TRAINING, Case
from .suite import DENSE, Plot, Suite

NAME = "soft"
TOKENS = 256

SUITE = Suite(
    NAME,
    "What does soft training of FFF cost beside a dense layer of equal training width?",
    tuple(
        Case(
            NAME,
            depth,
            TOKENS,
            leaf_width=leaf_width,
            step=TRAINING,
            routing=SOFT,
            memory=True,
            baselines=(*DENSE, "published"),
        )
        for leaf_width in (8, 16, 32)
        for depth in range(4, 9)
    ),
    (Plot("neurons", "speedup", "training width"),),
)
