"""Fixtures shared by the tests, which run on every device there is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torch_fff import _C

HAS_GPU = _C.cuda_version is not None and torch.cuda.is_available()
NEEDS_GPU = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU and a build with CUDA")

# The tolerances are those of products in their own dtype, which are summed in float32 at least.
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False
torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
# Without this cuBLAS refuses to work under torch.use_deterministic_algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_generate_tests(metafunc):
    """Every test has a device: all there are, or the one that its marker names."""
    if metafunc.definition.get_closest_marker("gpu"):
        devices = [pytest.param("cuda", marks=NEEDS_GPU)]
    elif metafunc.definition.get_closest_marker("cpu") or not HAS_GPU:
        devices = ["cpu"]
    else:
        devices = ["cpu", "cuda"]
    metafunc.parametrize("device", devices, indirect=True)


@pytest.fixture(autouse=True)
def device(request):
    """Where tensors and layers are made that name no device."""
    chosen = torch.device(request.param)
    if chosen.type == "cpu":
        yield chosen
        return
    torch.set_default_device(chosen)
    yield chosen
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def _seed(device):
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Folder with what examples/cpp/export_model.py writes."""
    folder = tmp_path_factory.mktemp("exported")
    script = Path(__file__).parents[2] / "examples" / "cpp" / "export_model.py"
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder
