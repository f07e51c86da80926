"""One thread a token, as in UltraFastBERT's CUDA code; compiled when it is first used."""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..case import TRAINING, Case
from ..layers import Layer

_SOURCE = Path(__file__).with_suffix(".cu")
_POINTERS = ("x", "node_weight", "node_bias", "node_output", "y")
_SIZES = ("tokens", "trees", "levels", "input_width", "output_width")


class _Trees(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
    ]


class NaiveTrees(nn.Module):
    """Shares the weights of a layer."""

    layer: Any

    def __init__(self, case: Case, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        self.case = case
        self.run = _compiled(case.device)

    def forward(self, x: Tensor) -> Tensor:
        case, layer = self.case, self.layer
        y = x.new_empty(len(x), case.output_width)
        tensors = (x, layer.node_weights, layer.node_biases, layer.node_outputs, y)
        sizes = (len(x), case.trees, case.levels, case.input_width, case.output_width)
        stream = torch.cuda.current_stream().cuda_stream if x.is_cuda else None
        error = self.run(_Trees(*(t.data_ptr() for t in tensors), *sizes), stream)
        if error:
            raise RuntimeError(f"naive_trees: CUDA error {error}")
        return y


@functools.cache
def _compiled(device: str) -> Any:
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library = folder / "naive.so"
    if device == "cuda":
        nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc")) or "/usr/local/cuda/bin/nvcc"
        major, minor = torch.cuda.get_device_capability()
        command = [nvcc, f"-arch=sm_{major}{minor}", "-Xcompiler", "-fPIC"]
    else:
        command = [os.environ.get("CXX", "c++"), "-x", "c++", "-fPIC"]
    command += ["-O3", "-std=c++17", "-shared", "-o", str(library), str(_SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"naive.cu: {done.stderr.strip()}")
    function = ctypes.CDLL(str(library)).naive_trees
    function.argtypes = [_Trees, ctypes.c_void_p]
    return function


def build(case: Case, layer: Layer, x: Tensor) -> nn.Module:
    return NaiveTrees(case, layer)


def needs(case: Case) -> int:
    return 0


def unfit(case: Case) -> str:
    if case.leaf_width or case.step == TRAINING or case.torch_dtype != torch.float32:
        return "written for the forward of trees of neurons in float32"
    return ""
