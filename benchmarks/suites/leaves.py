from ..case import STRAIGHT_THROUGH, TRAINING, Case
from .suite import DENSE, NARROW, Plot, Suite

NAME = "leaves"
WIDTH = 4096  # neurons in the leaves of a tree


def _case(leaf_width: int, tokens: int, **more: object) -> Case:
    depth = (WIDTH // leaf_width).bit_length() - 1
    return Case(NAME, depth, tokens, leaf_width=leaf_width, **more)  # type: ignore[arg-type]


def _cases() -> list[Case]:
    others = ("batched", "published", "experts")
    forward = [
        _case(2**power, tokens, baselines=(*DENSE, *NARROW, *others))
        for tokens in (1, 64, 1024)
        for power in range(9)
    ]
    training = [
        _case(
            leaf_width,
            1024,
            step=TRAINING,
            routing=STRAIGHT_THROUGH,
            baselines=(*DENSE, "experts"),
        )
        for leaf_width in (1, 8, 32, 256)
    ]
    return forward + training


SUITE = Suite(
    NAME,
    f"What do wide leaves cost in hard FFF? Leaf widths 1 to 256 of {WIDTH} neurons.",
    tuple(_cases()),
    (Plot("leaf_width", "speedup", "leaf width"),),
)
