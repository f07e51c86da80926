from ..case import Case
from .suite import DENSE, NARROW, Plot, Suite

NAME = "trees"
TREES = ((1, 11), (4, 9), (16, 7), (64, 5), (128, 4), (3072, 0))  # K x D, about as many neurons

SUITE = Suite(
    NAME,
    "What do many shallow trees cost? From 1x11, 12 neurons a token, to 3072x0, all of them.",
    tuple(
        Case(NAME, depth, tokens, trees, baselines=(*DENSE, *NARROW, "masked"))
        for tokens in (1, 64, 1024)
        for trees, depth in TREES
    ),
    (Plot("visited", "speedup", "neurons visited by a token"),),
)
