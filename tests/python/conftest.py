"""Fixtures shared by the tests."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from torch_fff import _C

DEVICES = ["cpu"]
if _C.cuda_version is not None and torch.cuda.is_available():
    DEVICES.append("cuda")


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Folder with what examples/cpp/export_model.py writes."""
    folder = tmp_path_factory.mktemp("exported")
    script = Path(__file__).parents[2] / "examples" / "cpp" / "export_model.py"
    done = subprocess.run([sys.executable, script, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder
