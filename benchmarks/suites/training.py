from ..case import DTYPES, NONE, STRAIGHT_THROUGH, TRAINING, Case
from .suite import DENSE, Plot, Suite

NAME = "training"
_ROUTINGS = (
    {"routing": NONE, "baselines": (*DENSE, "masked", "batched")},
    {"routing": NONE, "row_sparse": True, "baselines": DENSE},
    {"routing": STRAIGHT_THROUGH, "baselines": DENSE},
    {"routing": STRAIGHT_THROUGH, "alternates": 3, "baselines": DENSE},
)


def _cases() -> list[Case]:
    return [
        Case(NAME, 11, tokens, dtype=dtype, step=TRAINING, **routing)
        for dtype in DTYPES
        for routing in _ROUTINGS
        for tokens in (1024, 16384)
    ]


SUITE = Suite(
    NAME,
    "How much faster is a training step, 768 -> 4095 neurons -> 768?",
    tuple(_cases()),
    (Plot("tokens", "speedup", "tokens"),),
)
