"""How a tree is trained: what is set before the first step, and what changes from step to step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from torch_fff import FFF, UltraFFF

# (layer, share of training done in [0, 1)): sets attributes of the layer
Schedule = Callable[[nn.Module, float], None]


@dataclass(frozen=True)
class Recipe:
    """routing: "straight_through", "none" (hard, without a routing gradient), "soft".

    noise: scale of the logistic noise at the start; falls to 0 at 60 % of training.
    slope: of the sigmoid; grows geometrically from 1 to it until 80 %.
    balance: weight of the balance loss at the start: of the nodes, falling as the noise does; in
        soft training of the leaves, and constant.
    hardening: weight h of the nodes' mean entropy in soft training; hardening_first: h in the first
        half.
    alternates: branches not taken that are drawn a token; None for all.
    region_leak: probability of flipping a decision.
    """

    routing: str = "straight_through"
    noise: float = 1.0
    slope: float = 10.0
    balance: float = 0.1
    hardening: float = 0.0
    hardening_first: float | None = None
    alternates: int | None = None
    region_leak: float = 0.0


def prepare(layer: nn.Module, recipe: Recipe | None) -> None:
    if recipe is None:
        return
    if isinstance(layer, FFF):
        layer.train_hardened = recipe.routing != "soft"
        layer.region_leak = recipe.region_leak
    if isinstance(layer, FFF | UltraFFF):
        layer.routing_gradient = "none" if recipe.routing == "none" else "straight_through"
        layer.alternates = recipe.alternates


def schedule(recipe: Recipe | None) -> Schedule:
    if recipe is None:
        return lambda layer, done: None
    return _soft(recipe) if recipe.routing == "soft" else _hard(recipe)


def _hard(recipe: Recipe) -> Schedule:
    def apply(layer: nn.Module, done: float) -> None:
        if isinstance(layer, FFF | UltraFFF):
            early = max(0.0, 1 - done / 0.6)
            layer.slope = recipe.slope ** min(1.0, done / 0.8)
            layer.noise = recipe.noise * early
        if isinstance(layer, FFF):
            layer.balance = recipe.balance * early

    return apply


def _soft(recipe: Recipe) -> Schedule:
    def apply(layer: nn.Module, done: float) -> None:
        if isinstance(layer, FFF):
            first = recipe.hardening if recipe.hardening_first is None else recipe.hardening_first
            hardening = first if done < 0.5 else recipe.hardening
            # The layer's own hardening loss is the sum over nodes.
            layer.hardening = hardening / max(layer.parallel_size * layer.n_nodes, 1)
            layer.balance = recipe.balance

    return apply
