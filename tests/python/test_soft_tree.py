"""functional.soft_tree and bernoulli_entropy."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cases import make_case
from tolerances import assert_close
from torch_fff import functional, reference

CASES = [
    {},
    *({"tokens": tokens} for tokens in [(), (0,), (1,), (64,), (300,), (2, 3, 5), (2, 0, 3)]),
    *({"width": width} for width in [1, 3, 33, 784]),
    *({"levels": levels} for levels in [0, 1, 2, 4, 5, 6]),
    {"levels": 9, "tokens": (20,), "leaf_width": 1},
    *({"leaf_width": leaf_width} for leaf_width in [1, 2, 8, 33]),
    {"trees": 2},
    {"trees": 3, "levels": 0},
    {"trees": 3, "node_output": True, "node_activation": "gelu", "tokens": (2, 3)},
    {"node_output": True, "levels": 0},
    {"node_output": True, "levels": 4, "leaf_activation": "silu"},
    {"leaf_width": None, "node_activation": "gelu"},
    {"leaf_width": None, "trees": 2, "levels": 1},
    {"node_bias": False, "b1": False, "b2": False},
    {"contiguous": False, "node_output": True},
]


def soft(case, function, **extra):
    return case.run(lambda **arguments: function(**arguments, **extra))


def all_gradients(outputs, case, grads):
    """The mixture of one leaf is constant, and nodes that do not exist are not used."""
    used = [(output, g) for output, g in zip(outputs, grads, strict=True) if output.requires_grad]
    outputs, grads = zip(*used, strict=True)
    inputs = list(case.inputs.values())
    return torch.autograd.grad(outputs, inputs, grads, materialize_grads=True)


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("leaky", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_equals_reference(device, dtype, options, leaky):
    case = make_case(dtype=dtype, device=device, **options)
    lead, trees = case.tensors["x"].shape[:-1], case.options["trees"]
    nodes = case.tensors["node_weight"].shape[0] // trees
    leak = torch.rand(*lead, trees, nodes, device=device) < 0.3 if leaky else None
    case = case.requires_grad()
    exact = case.to(torch.float64).requires_grad()
    actual = soft(case, functional.soft_tree, leak=leak)
    expected = soft(exact, reference.soft_tree, leak=leak)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        assert_close(a, e)

    # A loss on all three outputs, as entropy and balance losses need.
    grads = [torch.randn_like(a) for a in actual]
    gradients = all_gradients(actual, case, grads)
    expected_gradients = all_gradients(expected, exact, [g.double() for g in grads])
    for name, a, e in zip(case.inputs, gradients, expected_gradients, strict=True):
        assert_close(a, e, name=name)


@pytest.mark.parametrize("options", [{}, {"node_output": True, "trees": 2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(device, dtype, options):
    """Products round to the dtype between the ops; the result is as close as one rounding."""
    case = make_case(dtype=dtype, device=device, **options, tokens=(64,), width=33)
    actual = soft(case, functional.soft_tree)
    expected = soft(case.to(torch.float64), reference.soft_tree)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        assert_close(a, e)


def test_dropout():
    """A hidden activation is zero or scaled by 1 / (1 - p), per token and neuron."""
    case = make_case(tokens=(50,), trees=2)
    torch.manual_seed(3)
    actual = soft(case, functional.soft_tree, dropout=0.4)
    torch.manual_seed(3)
    mask = F.dropout(torch.ones(50, 2 * 8 * 4, dtype=torch.float64), 0.4)
    assert 0.3 < (mask == 0).double().mean() < 0.5
    mask = mask.view(50, 2, 8, 4)
    expected = soft(case, reference.soft_tree, hidden_scale=mask)
    assert_close(actual.output, expected.output)
    everything = soft(case, functional.soft_tree, dropout=1.0)
    only_biases = actual.mixture.flatten(1) @ case.tensors["b2"]
    assert_close(everything.output, only_biases)


def test_gradcheck(device):
    case = make_case(
        device=device,
        tokens=(2,),
        width=3,
        leaf_width=2,
        out=2,
        trees=2,
        levels=2,
        node_output=True,
        node_activation="silu",
        leaf_activation="gelu",
    ).requires_grad()

    def function(*inputs):
        arguments = dict(zip(case.inputs, inputs, strict=True))
        return tuple(functional.soft_tree(**arguments, **case.options))

    assert torch.autograd.gradcheck(function, tuple(case.inputs.values()))


class LargestAllocation(TorchDispatchMode):
    """Elements of the largest float32 tensor that any op makes, backward included."""

    def __init__(self, case):
        super().__init__()
        self.given = {t.untyped_storage().data_ptr() for t in case.tensors.values()}
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.given:
                self.elements = max(self.elements, storage.nbytes() // 4)
        return result


def test_never_tokens_by_leaves_by_outputs():
    tokens, leaves, leaf_width, out = 256, 32, 2, 40
    case = make_case(
        dtype=torch.float32, tokens=(tokens,), levels=5, leaf_width=leaf_width, out=out
    ).requires_grad()
    with LargestAllocation(case) as largest:
        soft(case, functional.soft_tree).output.sum().backward()
    assert largest.elements == tokens * leaves * leaf_width


def test_no_copy_of_weights():
    case = make_case(dtype=torch.float32, tokens=(1,), width=64, levels=5, leaf_width=8, out=64)
    with LargestAllocation(case) as largest:
        soft(case, functional.soft_tree)
    assert largest.elements == 32 * 8  # hidden activations of the one token


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_entropy(dtype):
    logits = torch.tensor([-math.inf, -20.0, -1.5, 0.0, 0.3, 4.0, 20.0, math.inf], dtype=dtype)
    entropy = functional.bernoulli_entropy(logits.requires_grad_())
    c = torch.sigmoid(logits.detach().double()).clamp(1e-6, 1 - 1e-6)
    assert_close(entropy, -c * c.log() - (1 - c) * (1 - c).log())
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    z = logits.detach().double()[2:6]
    slope = -z * torch.sigmoid(z) * torch.sigmoid(-z)  # dH/dz = -z c (1 - c)
    assert_close(gradient[2:6], slope)
    assert (gradient[[0, 1, 6, 7]] == 0).all()  # clamped
