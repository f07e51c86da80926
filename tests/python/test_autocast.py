"""Autocast: x and the weights are cast, scores, noise and leaf_scale stay float32."""

from functools import partial

import pytest
import torch

from cases import make_case
from tolerances import assert_close
from torch_fff import functional, reference

DTYPES = [torch.bfloat16, torch.float16]
TREES = [
    {},
    {"trees": 2, "noise": True, "leaf_scale": True, "straight_through": True, "alternates": True},
    {"leaf_width": None, "node_activation": "gelu"},
]


def autocast(device, dtype):
    return torch.autocast(device.type, dtype)


def cast(case, dtype):
    """What autocast makes of the arguments."""
    tensors = {
        name: tensor.to(dtype) if name in case.inputs else tensor
        for name, tensor in case.tensors.items()
    }
    return type(case)(tensors, case.options)


@pytest.mark.parametrize("options", TREES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tree(device, dtype, options):
    case = make_case(dtype=torch.float32, device=device, **options)
    g = torch.randn(7, 8, device=device).to(dtype)
    expected, expected_gradients = cast(case, dtype).gradients(functional.tree, g, None)
    with autocast(device, dtype):
        actual, gradients = case.gradients(functional.tree, g, None)
    assert actual.output.dtype == dtype
    assert actual.scores.dtype == torch.float32
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, expected_gradients[name].float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_arguments(device, dtype):
    """Arguments of different dtypes are all cast; noise of the autocast dtype is cast back."""
    case = make_case(dtype=torch.float32, device=device, noise=True)
    case.tensors["noise"] = case.tensors["noise"].to(dtype)
    case.tensors["w1"] = case.tensors["w1"].to(dtype)
    with autocast(device, dtype):
        actual = case.run(functional.tree)
    case = cast(case, dtype)
    case.tensors["noise"] = case.tensors["noise"].float()
    for a, e in zip(actual, case.run(functional.tree), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_descend(device, dtype):
    x, weight, bias = make_case(dtype=torch.float32, device=device).arguments()[:3]
    with autocast(device, dtype):
        scores, leaf = functional.descend(x, weight, bias)
    expected = functional.descend(x.to(dtype), weight.to(dtype), bias.to(dtype))
    assert scores.dtype == torch.float32
    assert torch.equal(scores, expected[0])
    assert torch.equal(leaf, expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_soft_tree(device, dtype):
    options = {"trees": 2, "node_output": True, "tokens": (64,), "leaf_activation": "gelu"}
    case = make_case(dtype=torch.float32, device=device, **options).requires_grad()
    exact = cast(case, dtype).to(torch.float64).requires_grad()
    with autocast(device, dtype):
        actual = case.run(functional.soft_tree)
    expected = exact.run(reference.soft_tree)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == dtype
        assert_close(a, e)
    g = torch.randn_like(actual.output)
    gradients = torch.autograd.grad(actual.output, list(case.inputs.values()), g)
    exact_gradients = torch.autograd.grad(expected.output, list(exact.inputs.values()), g.double())
    for name, a, e in zip(case.inputs, gradients, exact_gradients, strict=True):
        assert a.dtype == torch.float32
        assert_close(a, e, dtype, name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated_activation(device, dtype):
    pre, mixture = torch.randn(5, 8, device=device), torch.rand(5, 4, device=device)
    with autocast(device, dtype):
        hidden = functional.gated_activation(pre.to(dtype), mixture)
    expected = functional.gated_activation(pre.to(dtype), mixture.to(dtype))
    assert torch.equal(hidden, expected)


@pytest.mark.parametrize("options", TREES, ids=str)
def test_transforms(device, options):
    """Autocast inside torch.func.grad casts as it does in ordinary autograd."""
    case = make_case(dtype=torch.float32, device=device, **options)
    constant = {k: t for k, t in case.tensors.items() if k not in case.inputs}

    def loss(inputs):
        with autocast(device, torch.bfloat16):
            output = functional.tree(**inputs, **constant, **case.options).output
            gated = functional.gated_activation(inputs["x"], inputs["x"][:, :4], "gelu")
        return output.float().square().sum() + gated.float().sum()

    actual = torch.func.grad(loss)(case.inputs)
    leaves = case.requires_grad().inputs
    expected = torch.autograd.grad(loss(leaves), list(leaves.values()))
    for gradient, wanted in zip(actual.values(), expected, strict=True):
        assert gradient.dtype == torch.float32
        # Ordinary autograd casts x once and adds its two gradients in the autocast dtype.
        assert_close(gradient, wanted, torch.bfloat16)


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (functional.tree, {"levels": 3}),
        # A forest that is large and shallow enough for dense products.
        (
            functional.tree,
            {"leaf_width": None, "levels": 3, "trees": 90, "tokens": (20,), "width": 400},
        ),
        (functional.soft_tree, {"levels": 3}),
        (partial(functional.soft_tree, prune=1e-6), {"levels": 3}),
    ],
    ids=["tree", "forest", "soft_tree", "pruned"],
)
def test_backward_inside(device, function, options):
    """Autocast that is on in the backward pass alone changes nothing."""
    case = make_case(dtype=torch.float32, device=device, **options).requires_grad()
    output, leaves = case.run(function)[0], list(case.inputs.values())
    g = torch.randn_like(output)
    expected = torch.autograd.grad(output, leaves, g, retain_graph=True)
    with autocast(device, torch.bfloat16):
        actual = torch.autograd.grad(output, leaves, g)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


def test_disabled(device):
    case = make_case(dtype=torch.float32, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=False):
        assert case.run(functional.tree).output.dtype == torch.float32
        assert case.run(functional.soft_tree).output.dtype == torch.float32


def test_float64(device):
    """As everywhere in torch, autocast leaves float64 as it is."""
    case = make_case(device=device, noise=True, leaf_scale=True)
    expected = case.run(functional.tree)
    with autocast(device, torch.bfloat16):
        actual = case.run(functional.tree)
    assert torch.equal(actual.output, expected.output)
