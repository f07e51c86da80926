from ..case import DTYPES, Case
from .suite import DENSE, NARROW, Plot, Suite

NAME = "forward"
TOKENS = (1, 8, 64, 128, 1024, 16384)
FEW = (1, 8, 64, 128, 1024)
LAYERS = 12


def _cases() -> list[Case]:
    hot = (*DENSE, *NARROW, "masked", "batched")
    # Compiling twelve layers takes long, and the kernels are those of the hot case.
    cold = ("dense-eager", "dense-onednn")
    cases = []
    for dtype in DTYPES:
        for tokens in TOKENS:
            cases.append(Case(NAME, 11, tokens, dtype=dtype, baselines=hot))
        for tokens in FEW:
            cases.append(Case(NAME, 11, tokens, dtype=dtype, layers=LAYERS, baselines=cold))
    return cases


SUITE = Suite(
    NAME,
    "How much faster is inference, from one token to many, 768 -> 4095 neurons -> 768?",
    tuple(_cases()),
    (Plot("tokens", "speedup", "tokens"),),
)
