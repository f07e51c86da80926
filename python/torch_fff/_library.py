"""Finds the op library and loads it, or says in one sentence why that cannot be."""

from importlib import import_module
from pathlib import Path

import torch

cmake_prefix_path = str(Path(__file__).parent)
"""For CMAKE_PREFIX_PATH, where CMake's ``find_package(torch_fff)`` looks for the C++ interface."""

_BUILD = "build it with `pip install --no-build-isolation .` in torch-fff's source directory"


def load() -> None:
    """Register torch.ops.fff from this package's lib/libtorch_fff.so.

    Raises:
        ImportError: the op library is missing, was built for another torch, or does not load.
    """
    library = Path(cmake_prefix_path, "lib", "libtorch_fff.so")
    # _C is free of torch: it can be asked about the op library before that one is touched, whose
    # own failure under another torch would be an undefined symbol or worse.
    try:
        build = import_module("torch_fff._C")
    except ImportError as error:
        raise ImportError(
            f"torch_fff's native code is missing or for another Python: {_BUILD}"
        ) from error
    if not library.exists():
        raise ImportError(f"torch_fff's op library {library} is missing: {_BUILD}")
    if _minor(build.torch_version) != _minor(torch.__version__):
        raise ImportError(
            f"torch_fff was built for torch {build.torch_version}, "
            f"but torch {torch.__version__} is installed: re{_BUILD}"
        )
    if build.cuda_version is not None and torch.version.cuda is None:
        raise ImportError(
            f"torch_fff was built for CUDA {build.cuda_version}, "
            f"but torch {torch.__version__} has no CUDA: re{_BUILD}"
        )
    try:
        torch.ops.load_library(library)
    except OSError as error:
        raise ImportError(f"torch_fff's op library does not load ({error}): re{_BUILD}") from error


def _minor(version: str) -> list[str]:
    """Major and minor: the granularity at which torch's C++ interface changes."""
    return version.split(".")[:2]
