r"""Losses on the decisions of the layers.

One normalisation throughout: means over tokens (all leading dimensions), sums over nodes, trees and
layers, so that a weight means the same at every batch size. No tokens: 0. Accumulated in float32
(float64 for float64 input); every loss is a scalar of that dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ._routing import visited_nodes
from .functional import bernoulli_entropy, node_reach


def hardening_loss(model: nn.Module) -> Tensor:
    r"""Hardening loss of the last soft training forward of a model's :class:`FFF` layers.

    sum over layers and nodes of mean over tokens of H(c), with c = sigmoid(logit) a node's decision
    and H(c) = -c ln c - (1 - c) ln(1 - c) (arXiv 2308.14711). Add ``h`` times it to the loss,
    before ``backward``. A layer that ran more than once since counts with its last forward.

    Raises:
        RuntimeError: no layer has run a soft training forward since ``model.train()``, or gradients
            are enabled now and were not in that forward (``no_grad``, reentrant checkpointing).
    """
    losses = []
    for name, module in model.named_modules():
        logits = getattr(module, "_node_logits", None)
        if logits is None:
            continue
        if torch.is_grad_enabled() and not logits.requires_grad:
            raise RuntimeError(
                f"hardening_loss: {name or 'model'}: expected node logits with a gradient, got "
                "some computed without (torch.no_grad, reentrant checkpointing): use "
                "checkpoint(..., use_reentrant=False) or FFF(hardening=...)"
            )
        losses.append(node_entropies(logits).sum())
    if not losses:
        raise RuntimeError(
            "hardening_loss: model: expected a torch_fff.FFF that has run a soft forward in "
            "training mode, got none"
        )
    return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()


def node_entropies(node_logits: Tensor) -> Tensor:
    """Mean over tokens of the entropy of each node's decision, in nats: [..., K, n] -> [K * n]."""
    entropies = bernoulli_entropy(_accumulated(node_logits)).flatten(-2)
    entropies = entropies.unsqueeze(0).flatten(0, -2)
    return entropies.sum(0) / max(entropies.shape[0], 1)


def leaf_balance_loss(mixture: Tensor) -> Tensor:
    r"""Load balance of soft trees (arXiv 2405.16836), from their mixture [..., K, leaves].

    leaves / B^2 * sum over leaves of P * f per tree: P is the sum of the leaf's weights over the B
    tokens, f the number of tokens whose hard path ends in it (not differentiated). 1 per tree when
    balanced, ``leaves`` when one leaf takes all.
    """
    mixture = _accumulated(mixture).unsqueeze(0).flatten(0, -3)
    tokens, trees, leaves = mixture.shape
    arrived = _hard_leaf(mixture.detach()).T
    arrivals = mixture.new_zeros(trees, leaves)
    arrivals = arrivals.scatter_add(1, arrived, torch.ones_like(arrived, dtype=arrivals.dtype))
    return leaves * (mixture.sum(0) * arrivals).sum() / max(tokens, 1) ** 2


def _hard_leaf(mixture: Tensor) -> Tensor:
    """The leaf that rounded decisions lead to: down to the heavier side, ties right."""
    leaf = torch.zeros_like(mixture[..., :1], dtype=torch.int64)
    reach = node_reach(mixture)
    for level in range(1, (mixture.shape[-1] - 1).bit_length() + 1):
        first = 2**level - 1  # of the level's nodes in heap order; the leaves lie below the last
        weights = mixture if 2**level == mixture.shape[-1] else reach[..., first : 2 * first + 1]
        left, right = weights.gather(-1, 2 * leaf), weights.gather(-1, 2 * leaf + 1)
        leaf = 2 * leaf + (right >= left)
    return leaf.squeeze(-1)


def node_balance_loss(scores: Tensor, leaf: Tensor, slope: float = 1.0) -> Tensor:
    r"""Balance of the decisions of hard trees, from what :func:`torch_fff.functional.tree` returns.

    sum over nodes of reach * (-ln(alpha) / 2 - ln(1 - alpha) / 2 - ln 2): reach is the share of
    tokens that visit the node (not differentiated), alpha the mean of sigmoid(slope * score) over
    them, clamped to [1e-3, 1 - 1e-3]. 0 when every visited node sends half of its tokens each way.

    Args:
        scores: [..., K, levels], scores of the visited nodes.
        leaf: [..., K], int64 in [0, 2^levels), where the path ends. For a neuron tree, whose last
            level routes nothing, pass ``scores[..., :-1]``.
        slope: of the sigmoid.
    """
    trees, levels = scores.shape[-2:]
    right = torch.sigmoid(slope * _accumulated(scores)).flatten()
    node = visited_nodes(leaf, levels).flatten()
    zeros = right.new_zeros(trees * (2**levels - 1))
    visits = zeros.index_add(0, node, torch.ones_like(right))
    alpha = zeros.index_add(0, node, right) / visits.clamp(min=1)
    alpha = alpha.clamp(1e-3, 1 - 1e-3)
    imbalance = -0.5 * (alpha.log() + (-alpha).log1p()) - math.log(2)
    return (visits * imbalance).sum() / max(leaf.numel() // trees, 1)


def _accumulated(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
