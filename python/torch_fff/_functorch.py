"""The differentiable ops as Python autograd functions, for torch.func transforms only.

The ops carry their autograd in C++, which costs a third of what Python's does per call, but which
torch.func cannot transform. The functions below have the ops' signatures and call the ops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._linear import linear

_ops = torch.ops.fff


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What autocast makes of the arguments of an op.

    It casts below Python's autograd functions, which save what they are given, but above those of
    C++. Here too what is saved has to match the gradient's dtype.
    """
    device = next(t for t in tensors if t is not None).device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


class _Backward(torch.autograd.Function):
    """Calls a ``*_backward`` op, and refuses to be differentiated where the gradient is used."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: torch._ops.OpOverload, *args: Any) -> Any:
        return op(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(f"{ctx.op.name()} cannot be differentiated: there is no double backward")


class _LeafMixture(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(node_logits: Tensor) -> Any:
        return _ops.leaf_mixture.default(node_logits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad_mixture: Tensor) -> Any:
        return _Backward.apply(_ops.leaf_mixture_backward.default, grad_mixture, *ctx.saved_tensors)


class _GatedActivation(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(pre: Tensor, mixture: Tensor, activation: str) -> Any:
        return _ops.gated_activation.default(pre, mixture, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
        *tensors, ctx.activation = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        grads = _Backward.apply(
            _ops.gated_activation_backward.default, grad_output, *ctx.saved_tensors, ctx.activation
        )
        return *grads, None


class _SparseLeaves(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return _ops.sparse_leaves.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tensors, ctx.options = inputs[:6], inputs[6:]
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        needed = ctx.needs_input_grad[:6]
        grads = _Backward.apply(
            _ops.sparse_leaves_backward.default,
            grad_output,
            *ctx.saved_tensors,
            *ctx.options,
            (needed[0], any(needed[2:])),
        )
        wanted = (grad if need else None for grad, need in zip(grads, needed, strict=True))
        return *wanted, None, None


class _SparseLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
        return linear(x, weight, bias)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor
    ) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        needed = ctx.needs_input_grad
        x, weight = ctx.saved_tensors
        op = _ops.sparse_linear_backward.default
        if torch.compiler.is_compiling():  # which cannot see through a function in a backward
            grads = op(grad_output, x, weight, needed[:2])
        else:
            grads = _Backward.apply(op, grad_output, x, weight, needed[:2])
        wanted = (grad if need else None for grad, need in zip(grads, needed[:2], strict=True))
        return *wanted, grad_output.sum_to_size(weight.shape[:1]) if needed[2] else None


class _Tree(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return _ops.tree.default(*args)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        _, scores, leaf = output
        ctx.mark_non_differentiable(leaf)
        tensors, ctx.options = inputs[:11], inputs[11:-1]  # without row_sparse_grad: it is False
        ctx.save_for_backward(scores, leaf, *tensors)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_scores: Tensor, grad_leaf: Tensor) -> Any:
        needed = ctx.needs_input_grad[:8]
        output_mask = (needed[0], any(needed[1:4]), any(needed[4:]))
        grads = _Backward.apply(
            _ops.tree_backward.default,
            grad_output,
            grad_scores,
            *ctx.saved_tensors,
            *ctx.options,
            output_mask,
        )
        wanted = (grad if need else None for grad, need in zip(grads, needed, strict=True))
        return *wanted, *(None,) * 11


def leaf_mixture(node_logits: Tensor) -> Any:
    return _LeafMixture.apply(node_logits)


def gated_activation(pre: Tensor, mixture: Tensor, activation: str) -> Any:
    return _GatedActivation.apply(*_autocast(pre, mixture), activation)


def sparse_leaves(*args: Any) -> Any:
    return _SparseLeaves.apply(*_autocast(*args[:6]), *args[6:])


def sparse_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
    """``F.linear`` on the CPU, whose backward is faster where its gradient is mostly zero.

    Written for matrix products that take far longer than a call, it has no form in C++.
    """
    return _SparseLinear.apply(*_autocast(x, weight, bias))


def tree(*args: Any) -> Any:
    defaults = (0.0, False)  # of the last two, which may be left out
    return _Tree.apply(*_autocast(*args[:8]), *args[8:17], *(args[17:] or defaults))
