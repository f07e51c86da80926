"""A model compiled by AOTInductor, run from Python; test_cpp_package.py runs it from C++."""

import pytest
import torch

from examples.cpp.export_model import WIDTH, Model

pytestmark = pytest.mark.cpu


@pytest.fixture
def model(exported):
    model = Model().eval()
    model.load_state_dict(torch.load(exported / "weights.pt"))
    return model


def test_package_takes_any_batch(exported, model):
    package = torch._inductor.aoti_load_package(str(exported / "model.pt2"))
    for batch in (1, 2, 7, 300):
        x = torch.randn(batch, WIDTH)
        torch.testing.assert_close(package(x), model(x), rtol=1e-4, atol=1e-5)


def test_example_is_what_the_model_computes(exported, model):
    example = torch.load(exported / "example.pt")
    torch.testing.assert_close(model(example["input"]), example["output"])
