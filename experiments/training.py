"""How a tree is trained: what is set before the first step, and what changes from step to step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from torch_fff import FFF, UltraFFF, init, recipes

from .moe import Experts


@dataclass(frozen=True)
class Recipe:
    """routing: "straight_through", "none" (hard, without a routing gradient), "soft".

    slope, noise, balance: of hard training, see :func:`torch_fff.recipes.straight_through`; in soft
        training balance is the constant weight of the leaves' balance.
    hardening: weight h of the nodes' mean entropy in soft training; hardening_first: h in the first
        half.
    alternates: branches not taken that are drawn a token; None for all.
    region_leak: probability of flipping a decision.
    splits: first decisions "as drawn", or at the "median" of training images, along directions as
        drawn or "principal" axes (torch_fff.init.median_splits_).
    """

    routing: str = "straight_through"
    noise: float = 1.0
    slope: float = 10.0
    balance: float = 0.1
    hardening: float = 0.0
    hardening_first: float | None = None
    alternates: int | None = None
    region_leak: float = 0.0
    splits: str = "as drawn"


def prepare(layer: nn.Module, recipe: Recipe, pixels: Tensor) -> None:
    """Set what stays as it is during training, and first weights from ``pixels`` [samples, in]."""
    if isinstance(layer, FFF):
        layer.train_hardened = recipe.routing != "soft"
        layer.region_leak = recipe.region_leak
    if isinstance(layer, FFF | UltraFFF):
        layer.routing_gradient = "none" if recipe.routing == "none" else "straight_through"
        layer.alternates = recipe.alternates
        if recipe.splits != "as drawn":
            direction = "drawn" if recipe.splits == "median" else recipe.splits
            init.median_splits_(layer, pixels, direction=direction)


def parameters(
    model: nn.Module,
    node_lr_scale: float | None,
    tree_lr_scale: float | None,
    *,
    lr: float,
    weight_decay: float,
) -> Iterable[nn.Parameter] | list[dict[str, Any]]:
    """For an optimizer: one group, or with a scale those of recipes.parameter_groups.

    ``tree_lr_scale`` is also for the experts of mixtures, of which a token reaches some, too.
    """
    if node_lr_scale is None and tree_lr_scale is None:
        return model.parameters()
    node, tree = (1.0 if scale is None else scale for scale in (node_lr_scale, tree_lr_scale))
    groups = recipes.parameter_groups(
        model, lr=lr, weight_decay=weight_decay, node_lr_scale=node, tree_lr_scale=tree
    )
    mixtures = [module for module in model.modules() if isinstance(module, Experts)]
    experts = {weight for mixture in mixtures for weight in mixture.experts()}
    parts = []
    for group in groups:
        of_experts = [parameter for parameter in group["params"] if parameter in experts]
        others = [parameter for parameter in group["params"] if parameter not in experts]
        parts.append(group | {"params": others})
        name, rate = f"{group['name']} experts", tree * group["lr"]
        parts.append(group | {"name": name, "params": of_experts, "lr": rate})
    return [part for part in parts if part["params"]]


def schedule(recipe: Recipe, layer: nn.Module) -> recipes.Schedule:
    if recipe.routing != "soft":
        return recipes.straight_through(
            slope=recipe.slope, noise=recipe.noise, balance=recipe.balance
        )
    assert isinstance(layer, FFF)
    # The layer's own hardening loss is the sum over nodes.
    nodes = max(layer.parallel_size * layer.n_nodes, 1)
    h = recipe.hardening
    first = h if recipe.hardening_first is None else recipe.hardening_first
    return recipes.published(hardening=first / nodes, then=h / nodes, balance=recipe.balance)
