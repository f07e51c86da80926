"""How far from the float64 reference a result may be: the one table that all tests use."""

import torch

# Relative to the size of an element and to the largest one of its tensor: the error of a sum is
# relative to its terms. A few roundings of the dtype.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 5e-6,
    torch.bfloat16: 1.6e-2,
    torch.float16: 2e-3,
}

# Tests keep scores and pre-activations this far from where a decision or ReLU's slope flips, which
# is above the error of a sum in the accumulation type (float32, float64 for float64).
MARGIN = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-5,
    torch.float16: 1e-5,
}


def assert_close(actual, expected, dtype=None, name=None):
    """``actual``, which was computed in ``dtype`` (its own by default), equals ``expected``."""
    expected = expected.detach().double()
    finite = expected[expected.isfinite()]
    scale = finite.abs().max().item() if finite.numel() else 0.0
    tolerance = TOLERANCE[dtype or actual.dtype]
    torch.testing.assert_close(
        actual.detach().double(),
        expected,
        rtol=tolerance,
        atol=tolerance * scale,
        equal_nan=True,
        msg=None if name is None else lambda message: f"{name}: {message}",
    )
