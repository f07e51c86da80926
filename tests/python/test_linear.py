"""fff::linear, the product of soft trees, and its backward."""

import pytest
import torch
import torch.nn.functional as F

from tolerances import assert_close

pytestmark = pytest.mark.cpu

linear = torch.ops.fff.linear
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (tokens, in, out): the last two are large enough for another library than ATen's choice.
SHAPES = [(0, 8, 4), (1, 8, 1), (5, 33, 7), (70, 200, 300), (256, 96, 130)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_torch(dtype, shape, bias, transposed):
    tokens, width, out = shape
    x = torch.randn(tokens, width).to(dtype).requires_grad_()
    weight = torch.randn(width, out).to(dtype).t()
    weight = (weight if transposed else weight.contiguous()).requires_grad_()
    inputs = [x, weight]
    if bias:
        inputs.append(torch.randn(out).to(dtype).requires_grad_())
    grad = torch.randn(tokens, out).to(dtype)
    actual = linear(x, weight, inputs[2] if bias else None)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    expected = F.linear(*exact)
    assert actual.dtype == dtype
    assert_close(actual, expected)
    gradients = torch.autograd.grad(actual, inputs, grad)
    references = torch.autograd.grad(expected, exact, grad.double())
    for a, e, t in zip(gradients, references, inputs, strict=True):
        assert a.dtype == dtype
        assert_close(a, e)
        assert a.numel() == 0 or a.stride() == t.stride()


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_only_wanted_gradients(frozen):
    inputs = [torch.randn(s) for s in ((6, 8), (3, 8), (3,))]
    for i, t in enumerate(inputs):
        t.requires_grad_(i != frozen)
    linear(*inputs).square().sum().backward()
    assert [t.grad is not None for t in inputs] == [i != frozen for i in range(3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_of_a_sum(shape):
    """Its entries are one repeated number."""
    tokens, width, out = shape
    inputs = [torch.randn(tokens, width), torch.randn(out, width), torch.randn(out)]
    for t in inputs:
        t.requires_grad_()
    gradients = torch.autograd.grad(linear(*inputs).sum(), inputs)
    for a, e in zip(gradients, torch.autograd.grad(F.linear(*inputs).sum(), inputs), strict=True):
        assert_close(a, e)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.randn(8), torch.randn(3, 8), None), ["x", "[tokens, in]", "[8]"]),
        ((torch.randn(2, 8), torch.randn(3, 7), None), ["weight", "[out, 8]", "[3, 7]"]),
        ((torch.randn(2, 8), torch.randn(3, 8), torch.randn(4)), ["bias", "[3]", "[4]"]),
        ((torch.randn(2, 8), torch.randn(3, 8).double(), None), ["weight", "Float", "Double"]),
        ((torch.ones(2, 8).long(), torch.ones(3, 8).long(), None), ["x", "Long"]),
    ],
)
def test_errors(arguments, words):
    with pytest.raises(RuntimeError, match="fff::linear") as error:
        linear(*arguments)
    for word in words:
        assert word in str(error.value)
