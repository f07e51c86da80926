from ..case import TRAINING, ModelCase
from .suite import Suite

NAME = "bert"
ALL = (
    "dense-eager",
    "dense-compiled",
    "distilbert",
    "distilbert-compiled",
    "ours-compiled",
    "ours-16x7",
    "ours-4x9",
    "ours-masked",
    "no-feedforward",
)
EAGER = ("dense-eager", "distilbert", "no-feedforward")  # where a call takes many seconds
# Compiling a backward takes longest: only what answers whether it helps.
TRAINED = tuple(name for name in ALL if name != "distilbert-compiled")


def _cases() -> list[ModelCase]:
    return [
        *(ModelCase(NAME, 1, sequence, baselines=ALL) for sequence in (16, 128, 512)),
        ModelCase(NAME, 32, 16, baselines=ALL),
        ModelCase(NAME, 32, 128, long=True, baselines=ALL),
        ModelCase(NAME, 32, 512, long=True, baselines=EAGER),
        ModelCase(NAME, 32, 16, step=TRAINING, baselines=TRAINED),
        ModelCase(NAME, 32, 128, step=TRAINING, long=True, baselines=EAGER),
    ]


SUITE = Suite(
    NAME,
    "What is left end to end? BERT-base with its 12 feedforward blocks replaced, by batch and "
    "sequence.",
    tuple(_cases()),
    (),
)
