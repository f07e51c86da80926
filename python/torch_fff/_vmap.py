"""vmap rules of the ops.

Tokens have any leading dimensions, so that a batch over token-side arguments becomes one more of
them and the op is called once. Where weights are batched the op is called per sample and its
outputs are stacked; so it always is where every sample has weight gradients of its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def _fold(
    op: Any, batch: int, in_dims: tuple[Any, ...], args: tuple[Any, ...], tokenwise: Iterable[int]
) -> tuple[Any, Any]:
    """Calls ``op`` once, the batch in front of every tensor at a ``tokenwise`` position."""
    folded = list(args)
    for i in tokenwise:
        if in_dims[i] is not None:
            folded[i] = args[i].movedim(in_dims[i], 0)
        elif args[i] is not None:
            folded[i] = args[i].expand(batch, *args[i].shape)
    output = op(*folded)
    return output, 0 if isinstance(output, Tensor) else (0,) * len(output)


def _loop(op: Any, batch: int, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """Calls ``op`` on every sample and stacks each of its outputs."""
    batched = [isinstance(dim, int) for dim in in_dims]
    outputs = [
        op(*(a.select(d, i) if b else a for a, d, b in zip(args, in_dims, batched, strict=True)))
        for i in range(batch)
    ]
    if isinstance(outputs[0], Tensor):
        return torch.stack(outputs), 0
    stacked = tuple(torch.stack(output) for output in zip(*outputs, strict=True))
    return stacked, (0,) * len(stacked)


def _register(name: str, tokenwise: Iterable[int], weights: Iterable[int] = ()) -> None:
    """Rule of an op whose tensor arguments stand at the positions ``tokenwise`` and ``weights``."""
    op = getattr(torch.ops.fff, name).default

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        if any(in_dims[i] is not None for i in weights):
            return _loop(op, info.batch_size, in_dims, args)
        return _fold(op, info.batch_size, in_dims, args, tokenwise)

    torch.library.register_vmap(f"fff::{name}", rule)


def _register_loop(name: str) -> None:
    op = getattr(torch.ops.fff, name).default

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        return _loop(op, info.batch_size, in_dims, args)

    torch.library.register_vmap(f"fff::{name}", rule)


_register("leaf_mixture", tokenwise=[0])
_register("leaf_mixture_backward", tokenwise=[0, 1, 2])
_register("gated_activation", tokenwise=[0, 1])
_register("gated_activation_backward", tokenwise=[0, 1, 2])
_register("descend", tokenwise=[0, 3], weights=[1, 2])
_register("tree", tokenwise=[0, 8, 9, 10], weights=range(1, 8))
_register_loop("tree_backward")
_register("sparse_leaves", tokenwise=[0, 1], weights=range(2, 6))
_register_loop("sparse_leaves_backward")
_register_loop("sparse_linear_backward")
