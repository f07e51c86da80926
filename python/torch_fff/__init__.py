"""Fast feedforward networks for PyTorch: layers that cost O(depth) instead of O(width)."""

from ._library import load

load()  # the modules below use the operators

from . import _fake, _vmap, functional, optim  # noqa: E402, F401
from .convert import convert  # noqa: E402
from .fff import FFF  # noqa: E402
from .losses import hardening_loss  # noqa: E402
from .ultra_fff import UltraFFF  # noqa: E402

__version__ = "0.1.0"

__all__ = ["FFF", "UltraFFF", "convert", "functional", "hardening_loss", "optim"]
