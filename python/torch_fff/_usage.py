"""Counting how often nodes and leaves are reached in training."""

from __future__ import annotations

import torch
from torch import Tensor

from ._routing import visited_nodes
from .functional import node_reach


def in_backward() -> bool:
    """Whether this forward recomputes an earlier one inside a backward pass (checkpointing)."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def exporting() -> bool:
    """Whether torch.export runs this forward; it forbids setting attributes."""
    # Dynamo of torch 2.11 takes is_exporting for true whenever it compiles.
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


@torch.no_grad()
def count_mixture(node_usage: Tensor, leaf_usage: Tensor, mixture: Tensor) -> None:
    """Add the weights with which tokens reach nodes and leaves (``mixture`` [..., K, leaves])."""
    if in_backward():
        return
    for usage, weight in ((node_usage, node_reach(mixture)), (leaf_usage, mixture)):
        weight = weight.flatten(-2).unsqueeze(0).flatten(0, -2)
        usage.add_(weight.sum(0, dtype=usage.dtype))


@torch.no_grad()
def count_path(node_usage: Tensor, leaf_usage: Tensor, leaf: Tensor, depth: int) -> None:
    """Add 1 for each token at every node on the path to ``leaf`` [..., K], and at the leaf."""
    if in_backward():
        return
    tree = torch.arange(leaf.shape[-1], device=leaf.device)
    for usage, row in (
        (node_usage, visited_nodes(leaf, depth)),
        (leaf_usage, leaf + tree * 2**depth),
    ):
        row = row.flatten()
        usage.index_add_(0, row, torch.ones_like(row, dtype=usage.dtype))
