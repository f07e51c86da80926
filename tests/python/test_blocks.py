from __future__ import annotations

import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from families import FAMILIES, HIDDEN, SEQUENTIAL, WIDTH, Family, output
from torch_fff._blocks import find_feedforward, recognise_activation
from torch_fff.reference import ACTIVATIONS

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_every_block_is_found_and_described(family: Family) -> None:
    blocks = find_feedforward(family.make())
    assert len(blocks) == 2
    assert blocks[0].name == family.first
    assert blocks[1].name == family.first.replace("0", "1")
    for block in blocks:
        assert (block.kind, block.activation) == (family.kind, family.activation)
        widths = (block.input_width, block.intermediate_width, block.output_width)
        assert widths == (WIDTH, HIDDEN, WIDTH)
        assert block.linear_in.shape == (HIDDEN, WIDTH)
        assert block.linear_out.shape == (WIDTH, HIDDEN)
        assert block.replacement is None


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_weights_are_those_of_the_function_that_the_model_computes(family: Family) -> None:
    model = family.make()
    block = find_feedforward(model)[0]
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    seen = {}
    entry = block.module_in if block.module_gate is None else block.entry
    entry.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    block.module_out.register_forward_hook(lambda module, args, y: seen.update(y=y))
    with torch.no_grad():
        output(model, family.input())
        x = seen["x"]
        activation = ACTIVATIONS[block.activation]
        hidden = F.linear(x, block.linear_in, block.bias_in)
        if block.linear_gate is None:
            hidden = activation(hidden)
        else:
            hidden = hidden * activation(F.linear(x, block.linear_gate, block.bias_gate))
        expected = F.linear(hidden, block.linear_out, block.bias_out)
        torch.testing.assert_close(seen["y"], expected)
        torch.testing.assert_close(block.dense(x), expected)


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
def test_restoring_gives_the_same_model_back(family: Family) -> None:
    model = family.make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules, x = repr(model), family.input()
    with torch.no_grad():
        y = output(model, x)
        blocks = find_feedforward(model)
        for block in blocks:
            block.replace_with(nn.Linear(WIDTH, WIDTH))
        assert find_feedforward(model) == blocks
        assert not torch.allclose(output(model, x), y)
        for block in blocks:
            block.restore()
            block.restore()  # does nothing
        assert torch.equal(output(model, x), y)
    assert repr(model) == modules
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


class _Odd(nn.Module):
    """i -> h that is no inverse of h -> i, no activation, or a norm of the hidden neurons."""

    def __init__(self, out: int, activation: bool, norm: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, out)
        self.norm = nn.LayerNorm(norm)
        if activation:
            self.act_fn = F.gelu


def test_what_only_looks_like_a_block_is_left_alone() -> None:
    assert len(find_feedforward(_Odd(WIDTH, True, WIDTH))) == 1
    assert not find_feedforward(_Odd(WIDTH + 1, True, WIDTH))
    assert not find_feedforward(_Odd(WIDTH, False, WIDTH))
    assert not find_feedforward(_Odd(WIDTH, True, HIDDEN))
    assert not find_feedforward(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)))
    assert not find_feedforward(nn.MultiheadAttention(WIDTH, 2))


def test_shared_blocks_are_found_once() -> None:
    block = SEQUENTIAL.make()[0]
    assert len(find_feedforward(nn.Sequential(block, block))) == 1


def _tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (nn.ReLU(), "relu"),
        (F.gelu, "gelu"),
        (partial(F.gelu, approximate="tanh"), "gelu_tanh"),
        (_tanh_gelu, "gelu_tanh"),
        (lambda x: x * x.sigmoid(), "silu"),
        (nn.Identity(), "identity"),
        (nn.Tanh(), None),
        (lambda x: x * (1.702 * x).sigmoid(), None),
        (lambda x: F.gelu(x).clamp(-10, 10), None),
        (nn.PReLU(3), None),
        (nn.GLU(), None),
    ],
)
def test_activation_is_known_by_what_it_computes(function: object, name: str | None) -> None:
    assert recognise_activation(function) == name


def test_transformers_is_not_imported() -> None:
    program = (
        "import sys; sys.modules['transformers'] = None\n"
        "import torch_fff; from torch import nn\n"
        "model = nn.TransformerEncoderLayer(8, 2, 16)\n"
        "print(torch_fff.replace_feedforward(model, depth=2).total.name)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "total\n", run.stderr
