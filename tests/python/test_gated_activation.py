"""fff::gated_activation and its backward."""

import math

import pytest
import torch

from tolerances import MARGIN, assert_close
from torch_fff import functional, reference
from torch_fff.reference import ACTIVATIONS

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    ((), 4, 3),
    ((0,), 4, 3),
    ((1,), 1, 1),
    ((7,), 8, 1),
    ((64,), 1, 33),
    ((300,), 16, 8),
    ((2, 3, 5), 3, 33),
    ((9,), 64, 2),
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("tokens", "leaves", "leaf_width"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(device, dtype, tokens, leaves, leaf_width, activation):
    pre = torch.randn(*tokens, leaves * leaf_width, device=device).mul(2).to(dtype)
    pre[pre.abs() < MARGIN[dtype]] = 1
    mixture = torch.rand(*tokens, leaves, device=device).to(dtype)
    grad = torch.randn_like(pre)
    inputs = [pre.requires_grad_(), mixture.requires_grad_()]
    hidden = functional.gated_activation(*inputs, activation)
    actual = torch.autograd.grad(hidden, inputs, grad)

    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = reference.gated_activation(*exact, activation)
    assert hidden.dtype == dtype
    assert_close(hidden, expected)
    for a, e in zip(actual, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert a.dtype == dtype
        assert_close(a, e)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(device, dtype):
    pre = torch.randn(12, 2, 5, device=device).to(dtype).permute(1, 2, 0)
    mixture = torch.rand(2, 5, 8, device=device).to(dtype)[..., ::2]
    grad = torch.randn(12, 5, 2, device=device).to(dtype).permute(2, 1, 0)
    results = []
    for change in (torch.clone, torch.Tensor.contiguous):
        p, m, g = (t if change is torch.clone else t.contiguous() for t in (pre, mixture, grad))
        inputs = [p.detach().requires_grad_(), m.detach().requires_grad_()]
        hidden = functional.gated_activation(*inputs, "silu")
        results.append((hidden, *torch.autograd.grad(hidden, inputs, g)))
    for strided, contiguous in zip(*results, strict=True):
        assert torch.equal(strided, contiguous)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extremes(device, dtype, activation):
    """Large, infinite and NaN pre-activations give what torch gives."""
    values = [-math.inf, -200.0, -30.0, 0.0, 30.0, 200.0, math.inf, math.nan]
    pre = torch.tensor(values, dtype=dtype, device=device)
    hidden = functional.gated_activation(pre, torch.ones_like(pre[:4]), activation)
    assert_close(hidden, ACTIVATIONS[activation](pre.double()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(device, activation):
    pre = torch.randn(3, 8, dtype=torch.float64, device=device, requires_grad=True)
    mixture = torch.rand(3, 4, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(functional.gated_activation, (pre, mixture, activation))


def test_no_double_backward():
    pre, mixture = torch.randn(5, 8, requires_grad=True), torch.rand(5, 4)
    loss = functional.gated_activation(pre, mixture, "gelu").square().sum()
    (gradient,) = torch.autograd.grad(loss, pre, create_graph=True)
    with pytest.raises(RuntimeError, match="fff::gated_activation_backward"):
        gradient.sum().backward()
