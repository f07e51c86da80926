"""Shapes, dtypes and strides of every op's outputs, for torch.compile and torch.export.

Every output is contiguous. Token dimensions may be symbolic; the number of nodes, which gives the
number of levels, is a property of the weights and is taken as a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

_Fake = TypeVar("_Fake", bound=Callable[..., Any])


def _register(name: str) -> Callable[[_Fake], _Fake]:
    """Registers a fake whose tensors are checked to share a device.

    One meta tensor among real ones makes the dispatcher call the fake, whose uninitialised result
    would pass for a real one.
    """
    arguments = getattr(torch.ops.fff, name).default._schema.arguments

    def register(fake: _Fake) -> _Fake:
        def checked(*args: Any) -> Any:
            named = zip(arguments, args, strict=False)  # defaults are left out
            first, *others = [(a.name, t) for a, t in named if isinstance(t, Tensor)]
            for argument, tensor in others:
                if tensor.device != first[1].device:
                    raise RuntimeError(
                        f"fff::{name}: {argument} must be on {first[1].device} like {first[0]}, "
                        f"got {tensor.device}"
                    )
            return fake(*args)

        torch.library.register_fake(f"fff::{name}", checked)
        return fake

    return register


def _scores_and_leaf(x: Tensor, node_weight: Tensor, trees: int) -> tuple[Tensor, Tensor]:
    levels = (int(node_weight.shape[0]) // trees + 1).bit_length() - 1
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    scores = x.new_empty((*x.shape[:-1], trees, levels), dtype=exact)
    return scores, x.new_empty((*x.shape[:-1], trees), dtype=torch.int64)


def _gradient(argument: Tensor | None, wanted: bool, like: Tensor) -> Tensor:
    """Empty where there is none."""
    if argument is None or not wanted:
        return like.new_empty(0)
    return argument.new_empty(argument.shape)


@_register("leaf_mixture")
def _leaf_mixture(node_logits: Tensor) -> Tensor:
    *tokens, nodes = node_logits.shape
    return node_logits.new_empty((*tokens, nodes + 1))


@_register("leaf_mixture_backward")
def _leaf_mixture_backward(grad_mixture: Tensor, node_logits: Tensor, mixture: Tensor) -> Tensor:
    return node_logits.new_empty(node_logits.shape)


@_register("gated_activation")
def _gated_activation(pre: Tensor, mixture: Tensor, activation: str) -> Tensor:
    return pre.new_empty(pre.shape)


@_register("gated_activation_backward")
def _gated_activation_backward(
    grad_output: Tensor, pre: Tensor, mixture: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    return pre.new_empty(pre.shape), mixture.new_empty(mixture.shape)


@_register("linear")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@_register("linear_backward")
def _linear_backward(
    grad_output: Tensor, x: Tensor, weight: Tensor, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    of_x, of_weight, of_bias = output_mask
    rows, columns = weight.shape
    transposed = weight.stride() == (1, rows)
    grad_weight = x.new_empty((columns, rows)).t() if transposed else x.new_empty((rows, columns))
    return (
        x.new_empty(x.shape if of_x else 0),
        grad_weight if of_weight else x.new_empty(0),
        x.new_empty(rows if of_bias else 0),
    )


@_register("sparse_leaves")
def _sparse_leaves(
    x: Tensor,
    mixture: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    prune: float,
    activation: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], w2.shape[-1]))


@_register("sparse_leaves_backward")
def _sparse_leaves_backward(
    grad_output: Tensor,
    x: Tensor,
    mixture: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    prune: float,
    activation: str,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    of_x, of_leaves = output_mask
    return (
        _gradient(x, of_x, x),
        mixture.new_empty(mixture.shape),
        *(_gradient(argument, of_leaves, x) for argument in (w1, b1, w2, b2)),
    )


@_register("sparse_linear_backward")
def _sparse_linear_backward(
    grad_output: Tensor, x: Tensor, weight: Tensor, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    of_x, of_weight = output_mask
    return _gradient(x, of_x, x), _gradient(weight, of_weight, x)


@_register("descend")
def _descend(
    x: Tensor,
    node_weight: Tensor,
    node_bias: Tensor | None,
    noise: Tensor | None,
    trees: int,
    tie_right: bool,
) -> tuple[Tensor, Tensor]:
    return _scores_and_leaf(x, node_weight, trees)


@_register("tree")
def _tree(
    x: Tensor,
    node_weight: Tensor,
    node_bias: Tensor | None,
    node_output: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    noise: Tensor | None,
    leaf_scale: Tensor | None,
    alternates: Tensor | None,
    trees: int,
    tie_right: bool,
    node_activation: str,
    leaf_activation: str,
    straight_through: bool,
    slope: float,
    min_slope: float = 0.0,
    row_sparse_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = w2 if w2 is not None else node_output
    assert rows is not None
    return x.new_empty((*x.shape[:-1], rows.shape[-1])), *_scores_and_leaf(x, node_weight, trees)


def _gradients(
    x: Tensor,
    of_nodes: Iterable[Tensor | None],
    of_leaves: Iterable[Tensor | None],
    output_mask: list[bool],
    rows: tuple[Any, Any] = (None, None),
) -> tuple[Tensor, ...]:
    """Shaped as the arguments, with ``rows`` of nodes and of leaves in place of all."""

    def gradient(argument: Tensor | None, wanted: bool, rows: Any = None) -> Tensor:
        if argument is None or not wanted:
            return x.new_empty(0)
        return argument.new_empty(argument.shape if rows is None else (rows, *argument.shape[1:]))

    return (
        gradient(x, output_mask[0]),
        *(gradient(argument, output_mask[1], rows[0]) for argument in of_nodes),
        *(gradient(argument, output_mask[2], rows[1]) for argument in of_leaves),
    )


@_register("tree_backward")
def _tree_backward(
    grad_output: Tensor | None,
    grad_scores: Tensor | None,
    scores: Tensor,
    leaf: Tensor,
    x: Tensor,
    node_weight: Tensor,
    node_bias: Tensor | None,
    node_output: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    noise: Tensor | None,
    leaf_scale: Tensor | None,
    alternates: Tensor | None,
    trees: int,
    tie_right: bool,
    node_activation: str,
    leaf_activation: str,
    straight_through: bool,
    slope: float,
    min_slope: float,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    of_nodes, of_leaves = (node_weight, node_bias, node_output), (w1, b1, w2, b2)
    return _gradients(x, of_nodes, of_leaves, output_mask)


@_register("tree_backward_rows")
def _tree_backward_rows(
    grad_output: Tensor | None,
    grad_scores: Tensor | None,
    scores: Tensor,
    leaf: Tensor,
    x: Tensor,
    node_weight: Tensor,
    node_bias: Tensor | None,
    node_output: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    noise: Tensor | None,
    leaf_scale: Tensor | None,
    alternates: Tensor | None,
    trees: int,
    tie_right: bool,
    node_activation: str,
    leaf_activation: str,
    straight_through: bool,
    slope: float,
    min_slope: float,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    of_nodes, of_leaves = (node_weight, node_bias, node_output), (w1, b1, w2, b2)
    nodes, leaves = (torch.library.get_ctx().new_dynamic_size() for _ in range(2))
    of_x, *of_weights = _gradients(x, of_nodes, of_leaves, output_mask, (nodes, leaves))
    return of_x, leaf.new_empty(nodes), leaf.new_empty(leaves), *of_weights
