"""Fixtures shared by the tests."""

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
