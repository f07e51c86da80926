"""Dense layers through oneDNN, where that is faster than ATen's choice: on AMD by far."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..case import TRAINING, Case
from ..check import assert_close
from ..layers import Layer
from .dense import Dense, dense_bytes

_FUSED = {nn.GELU: "gelu", nn.ReLU: "relu"}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """``weight`` is plain or prepared."""
    pointwise = torch.ops.mkldnn._linear_pointwise
    output: Tensor = pointwise(x, weight, bias, activation, [], "none")
    return output


class PreparedDense(nn.Module):
    """Weights in oneDNN's own layout for a number of tokens, hidden activation fused."""

    def __init__(self, layer: Dense, tokens: int) -> None:
        super().__init__()
        prepare = torch.ops.mkldnn._reorder_linear_weight
        self.w1 = prepare(layer.first.weight.detach(), tokens)
        self.w2 = prepare(layer.second.weight.detach(), tokens)
        self.b1, self.b2 = layer.first.bias, layer.second.bias
        self.activation = _FUSED[type(layer.activation)]

    def forward(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.w1, self.b1, self.activation), self.w2, self.b2)


class _Linear(torch.autograd.Function):
    """All three products of a linear layer's step; weights change, so none can be prepared."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_bias = grad.sum(0) if ctx.biased else None
        return linear(grad, weight.T, None), linear(grad.T, x.T, None), grad_bias


class TrainableDense(nn.Module):
    def __init__(self, layer: Dense) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layer.first, self.layer.second
        hidden = self.layer.activation(_Linear.apply(x, first.weight, first.bias))
        output: Tensor = _Linear.apply(hidden, second.weight, second.bias)
        return output


def _build(case: Case, width: int, x: Tensor) -> nn.Module:
    layer = Dense(case, width)
    training = case.step == TRAINING
    module = TrainableDense(layer) if training else PreparedDense(layer, case.tokens)
    with torch.no_grad():
        assert_close("dense-onednn", module(x), layer(x))
    if training:
        _check_gradients(module, layer, x)
    return module


def _check_gradients(module: nn.Module, layer: Dense, x: Tensor) -> None:
    def gradients(of: nn.Module) -> list[Tensor]:
        tokens = x[:64].detach().requires_grad_()
        return list(torch.autograd.grad(of(tokens).square().sum(), [tokens, *layer.parameters()]))

    for actual, expected in zip(gradients(module), gradients(layer), strict=True):
        assert_close("dense-onednn, gradient", actual, expected)


def equal(case: Case, layer: Layer, x: Tensor) -> nn.Module:
    return _build(case, case.equal_width, x)


def narrow(case: Case, layer: Layer, x: Tensor) -> nn.Module:
    return _build(case, case.visited, x)


def unfit(case: Case) -> str:
    return "" if case.device == "cpu" else "oneDNN is for the CPU"


def needs(case: Case) -> int:
    """While the weights are prepared the first ones are there as well."""
    return 2 * dense_bytes(case, case.equal_width)


def narrow_needs(case: Case) -> int:
    return 2 * dense_bytes(case, case.visited)
