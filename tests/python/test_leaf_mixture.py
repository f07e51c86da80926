"""fff::leaf_mixture and its backward, and node_reach."""

import math

import pytest
import torch

from tolerances import assert_close
from torch_fff import functional, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 4, 5, 6, 9])
@pytest.mark.parametrize("tokens", [(), (0,), (1,), (7,), (64,), (300,), (2, 3, 5)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(device, dtype, tokens, depth):
    logits = torch.randn(*tokens, 2**depth - 1, device=device).mul(2).to(dtype).requires_grad_()
    grad = torch.randn(*tokens, 2**depth, device=device).to(dtype)
    mixture = functional.leaf_mixture(logits)
    (actual,) = torch.autograd.grad(mixture, logits, grad)

    exact = logits.detach().double().requires_grad_()
    expected = reference.leaf_mixture(exact)
    assert mixture.dtype == actual.dtype == dtype
    assert mixture.is_contiguous()
    assert actual.shape == logits.shape
    assert_close(mixture, expected)
    if depth:
        (expected_grad,) = torch.autograd.grad(expected, exact, grad.double())
        assert_close(actual, expected_grad)
        assert_close(mixture.double().sum(-1), expected.sum(-1), dtype)
    else:
        assert (mixture == 1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(device, dtype):
    wide = torch.randn(31, 2, 8, device=device).to(dtype)
    logits = wide.permute(1, 2, 0)[..., ::2][..., :15].requires_grad_()
    assert not logits.is_contiguous()
    grad = torch.randn(16, 2, 8, device=device).to(dtype).permute(1, 2, 0)
    mixture = functional.leaf_mixture(logits)
    assert torch.equal(mixture, functional.leaf_mixture(logits.contiguous()))
    (actual,) = torch.autograd.grad(mixture, logits, grad)
    (expected,) = torch.autograd.grad(
        functional.leaf_mixture(logits.contiguous()), logits, grad.contiguous()
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saturated(device, dtype):
    """Logits whose sigmoid rounds to 0 or 1: exact weights, finite gradients."""
    logits = torch.tensor(
        [[math.inf, -math.inf, 300.0], [-300.0, 300.0, math.inf], [0.0, 60.0, -60.0]],
        dtype=dtype,
        device=device,
        requires_grad=True,
    )
    mixture = functional.leaf_mixture(logits)
    expected = [[0, 0, 0, 1], [0, 1, 0, 0], [0, 0.5, 0.5, 0]]
    assert_close(mixture, torch.tensor(expected, device=device))
    (grad,) = torch.autograd.grad(mixture, logits, torch.ones_like(mixture).cumsum(-1))
    # sigmoid'(0) times what the right half has more than the left one
    assert_close(grad, torch.tensor([[0, 0, 0], [0, 0, 0], [0.25, 0, 0]], device=device))


@pytest.mark.parametrize("depth", [1, 4])
def test_nan_stays_in_its_token(device, depth):
    logits = torch.randn(5, 2**depth - 1, device=device)
    clean = functional.leaf_mixture(logits)
    logits[2, 0] = math.nan
    mixture = functional.leaf_mixture(logits)
    assert mixture[2].isnan().all()
    assert torch.equal(mixture[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_gradcheck(device, depth):
    logits = torch.randn(2, 3, 2**depth - 1, dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(functional.leaf_mixture, logits.requires_grad_())


def test_no_double_backward():
    logits = torch.randn(5, 7, requires_grad=True)
    loss = functional.leaf_mixture(logits).square().sum()
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="fff::leaf_mixture_backward"):
        gradient.sum().backward()


def test_node_reach_of_mixture():
    """The weight of a node is the product over the path to it."""
    logits = torch.randn(6, 7, dtype=torch.float64)
    reach = functional.node_reach(functional.leaf_mixture(logits))
    right, left = torch.sigmoid(logits), torch.sigmoid(-logits)
    assert_close(reach[:, 0], torch.ones(6))
    assert_close(reach[:, 2], right[:, 0])
    assert_close(reach[:, 4], left[:, 0] * right[:, 1])
    assert_close(reach[:, 5], right[:, 0] * left[:, 2])
