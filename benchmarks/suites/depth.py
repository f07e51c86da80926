from ..case import Case
from .suite import DENSE, Plot, Suite

NAME = "depth"

SUITE = Suite(
    NAME,
    "Does time grow with depth and not with width? Depth 15 has 16 times the neurons of depth 11.",
    tuple(
        Case(NAME, depth, tokens, baselines=DENSE)
        for tokens in (1, 64, 1024)
        for depth in range(7, 16)
    ),
    (Plot("depth", "seconds", "depth"), Plot("depth", "speedup", "depth")),
    per_neuron=True,
)
