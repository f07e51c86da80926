from ..case import SOFT, TRAINING, Case
from .suite import DENSE, Plot, Suite

NAME = "prune"
TOKENS = 256

SUITE = Suite(
    NAME,
    "Does soft training that skips leaves of weight below 0.001 get faster as decisions harden?",
    tuple(
        Case(
            NAME,
            depth,
            TOKENS,
            leaf_width=8,
            step=TRAINING,
            routing=SOFT,
            prune=1e-3,
            entropy=entropy,
            memory=True,
            baselines=(*DENSE, "unpruned"),
        )
        for depth in (7, 8, 9)
        for entropy in (0.6, 0.3, 0.1, 0.03, 0.01)
    ),
    (Plot("entropy", "seconds", "mean entropy of a decision, nats"),),
)
