from ..case import DTYPES, NONE, STRAIGHT_THROUGH, TRAINING, Case
from .suite import DENSE, Plot, Suite

NAME = "training"


def _cases() -> list[Case]:
    return [
        Case(
            NAME,
            11,
            tokens,
            dtype=dtype,
            step=TRAINING,
            routing=routing,
            baselines=(*DENSE, "masked", "batched") if routing == NONE else DENSE,
        )
        for dtype in DTYPES
        for routing in (NONE, STRAIGHT_THROUGH)
        for tokens in (1024, 16384)
    ]


SUITE = Suite(
    NAME,
    "How much faster is a training step, 768 -> 4095 neurons -> 768?",
    tuple(_cases()),
    (Plot("tokens", "speedup", "tokens"),),
)
