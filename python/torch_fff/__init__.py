"""Fast feedforward networks for PyTorch: layers that cost O(depth) instead of O(width)."""

from ._library import cmake_prefix_path, load

load()  # the modules below use the operators

from . import _fake, _vmap, diagnostics, functional, init, optim, recipes  # noqa: E402, F401
from .convert import convert  # noqa: E402
from .fff import FFF  # noqa: E402
from .hugging_face import load_pretrained  # noqa: E402
from .losses import hardening_loss  # noqa: E402
from .replace import replace_feedforward, restore_feedforward  # noqa: E402
from .ultra_fast_bert import load_ultra_fast_bert  # noqa: E402
from .ultra_fff import UltraFFF  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "FFF",
    "UltraFFF",
    "cmake_prefix_path",
    "convert",
    "diagnostics",
    "functional",
    "hardening_loss",
    "init",
    "load_pretrained",
    "load_ultra_fast_bert",
    "optim",
    "recipes",
    "replace_feedforward",
    "restore_feedforward",
]
