"""Blocks inside a deep network: byte-level language models of Python's standard library."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from examples import text
from examples.language_model import LanguageModel
from examples.schedule import warm_cosine
from torch_fff import recipes

from .blocks import Block, DenseBlock, ExpertsBlock, TreeBlock, put_into
from .experiment import Cell, Experiment, Figures
from .moe import balance_loss
from .plots import figures, legend, save
from .results import Results
from .tables import markdown, origin
from .training import parameters

EVERY = 100  # steps between two validations
WINDOWS = 256  # of validation
BALANCE = 0.01  # weight of the load balance of experts and leaves, as in arXiv 2101.03961


@dataclass(frozen=True)
class Settings:
    """schedule: of the trees' attributes over the training.

    node_lr_scale, tree_lr_scale: learning rates of routing and of what only some tokens reach,
        experts included, relative; weight decay is then for matrices of leaves, experts and dense
        layers only (recipes.parameter_groups). Both None: one group of all parameters.
    """

    block: Block
    steps: int = 2400
    batch: int = 16
    length: int = 128
    width: int = 128
    heads: int = 4
    layers: int = 3
    learning_rate: float = 5e-3
    weight_decay: float = 0.01
    node_lr_scale: float | None = None
    tree_lr_scale: float | None = None
    schedule: recipes.Schedule | None = None


def tree(layer: str, **options: Any) -> TreeBlock:
    return TreeBlock(layer, options)


# What few tokens reach wants a lower rate than what all of them use.
FOUR_TREES = {"depth": 7, "parallel_size": 4}
LEVEL_BASE = {**FOUR_TREES, "shared_level_base": True}
LEAF_BASE = {"leaf_width": 10, "depth": 6, "parallel_size": 2, "shared_leaf_base": True}
ONE_TREE = {"leaf_width": 27, "depth": 5, "shared_leaf_base": True}
GATED = {"leaf_width": 27, "depth": 5, "slope": 3.0}
WIDER_LEAVES = {"leaf_width": 59, "depth": 4, "shared_leaf_base": True}
STRAIGHT_THROUGH = {"routing_gradient": "straight_through"}

CELLS: dict[str, Settings] = {
    "dense 32": Settings(DenseBlock(32)),
    "dense 128": Settings(DenseBlock(128)),
    "dense 512": Settings(DenseBlock(512)),
    "UltraFFF 4x7": Settings(tree("UltraFFF", **FOUR_TREES), tree_lr_scale=0.4),
    "UltraFFF 4x7, shared base": Settings(tree("UltraFFF", **LEVEL_BASE), tree_lr_scale=0.2),
    "UltraFFF 4x7, shared base, straight-through": Settings(
        tree("UltraFFF", **LEVEL_BASE, **STRAIGHT_THROUGH), tree_lr_scale=0.2
    ),
    "FFF 2x l=10 d=6, shared base": Settings(tree("FFF", **LEAF_BASE), tree_lr_scale=0.4),
    "FFF l=27 d=5, shared base": Settings(tree("FFF", **ONE_TREE), tree_lr_scale=0.4),
    "balanced tree l=27 d=5, shared base": Settings(
        tree("BalancedTree", **ONE_TREE, balance=BALANCE), tree_lr_scale=0.4, node_lr_scale=2.5
    ),
    "gated tree l=27 d=5": Settings(
        tree("GatedTree", **GATED), tree_lr_scale=0.4, node_lr_scale=2.5
    ),
    # As many rows a token as a mixture with its router's 32, and as many parameters.
    "FFF l=59 d=4, shared base": Settings(tree("FFF", **WIDER_LEAVES), tree_lr_scale=0.4),
    "top-1 of 32 experts of 32": Settings(ExpertsBlock(32, 32, active=1), tree_lr_scale=0.4),
    "top-2 of 64 experts of 16": Settings(ExpertsBlock(64, 16, active=2), tree_lr_scale=0.4),
}
NARROW, WIDE = "dense 32", "dense 512"  # between them the table measures


def run(settings: Settings, seed: int) -> Figures:
    """Trains one model. Losses are validation losses with hard routing, nats a byte.

    Returns:
        loss: at the end; losses, tokens, seconds_then: each EVERY steps, from the start on; seconds
        of training and inference, the latter of one batch: of the one thread that computes, so that
        waiting for other programs does not count; parameters, of the model.
    """
    data = text.load(None)
    torch.manual_seed(seed)
    model = build(settings)
    options = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    groups = parameters(model, settings.node_lr_scale, settings.tree_lr_scale, **options)
    optimizer = torch.optim.AdamW(groups, **options)
    rates = [group["lr"] for group in optimizer.param_groups]
    losses, tokens, clock = [validation_loss(model, data, settings)], [0], [0.0]
    seconds, begin = 0.0, time.process_time()
    for step in range(settings.steps):
        if settings.schedule:
            settings.schedule.apply(model, step / settings.steps)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * warm_cosine(step, settings.steps)
        seed_of_batch = seed * settings.steps + step
        x, target = text.windows(data.training, settings.batch, settings.length, seed_of_batch)
        loss = cross_entropy(model(x).flatten(0, 1), target.flatten())
        loss = loss + BALANCE * balance_loss(model)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % EVERY == 0 or step + 1 == settings.steps:
            seconds += time.process_time() - begin
            losses.append(validation_loss(model, data, settings))
            tokens.append((step + 1) * settings.batch * settings.length)
            clock.append(round(seconds, 2))
            begin = time.process_time()
    recipes.fold(model)
    return {
        "loss": losses[-1],
        "losses": [round(loss, 4) for loss in losses],
        "tokens": tokens,
        "seconds_then": clock,
        "seconds": clock[-1],
        "inference": inference_seconds(model, data, settings),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": len(data.training),
    }


def build(settings: Settings) -> nn.Module:
    """With one seed all models start from the same weights, but for their blocks."""
    s = settings
    model = LanguageModel(s.width, s.heads, s.layers, s.length, neurons=1)
    put_into(model, s.block)
    return model


@torch.inference_mode()
def validation_loss(model: nn.Module, data: text.Text, settings: Settings) -> float:
    """Mean over the same windows every time, nats a byte."""
    x, target = text.windows(data.validation, WINDOWS, settings.length, seed=0)
    model.eval()
    total = sum(
        cross_entropy(model(part).flatten(0, 1), wanted.flatten(), reduction="sum").item()
        for part, wanted in zip(x.split(settings.batch), target.split(settings.batch), strict=True)
    )
    model.train()
    return total / target.numel()


@torch.inference_mode()
def inference_seconds(model: nn.Module, data: text.Text, settings: Settings) -> float:
    """The fastest of some batches."""
    model.eval()
    fastest = math.inf
    for seed in range(20):
        x, _ = text.windows(data.validation, settings.batch, settings.length, seed)
        begin = time.process_time()
        model(x)
        fastest = min(fastest, time.process_time() - begin)
    return fastest


def table(results: Results) -> str:
    cells = [cell for cell in results.records if results.seeds(cell)]
    if not cells:
        return origin(results)
    budget = min(results.mean(cell, "seconds") or 0.0 for cell in cells)
    head = ["feedforward blocks", "visited", "neurons", "loss", "of the way", "training, s"]
    head += [f"loss at {budget:.0f} s", "inference, ms", "parameters", "seeds"]
    rows = []
    for cell in cells:
        block = CELLS[cell].block
        row = [cell, str(block.visited), str(block.neurons), _loss(results, cell)]
        row += [_of_the_way(results, cell), f"{results.mean(cell, 'seconds'):.0f}"]
        row.append(f"{_mean_loss_at(results, cell, budget):.3f}")
        row.append(f"{1e3 * (results.mean(cell, 'inference') or 0):.1f}")
        row += [f"{results.mean(cell, 'parameters'):,.0f}", str(results.seeds(cell))]
        rows.append(row)
    note = (
        "Validation loss, nats a byte, hard routing, mean ± standard deviation over seeds. "
        "Visited: neurons of a block that a token touches, nodes and router rows that only decide "
        f"included. Of the way: from {NARROW} (0 %) to {WIDE} (100 %), by the loss. Times are of "
        f"one thread; the loss at {budget:.0f} s is read off the curves, whose learning rates have "
        "not fallen yet where the training takes longer."
    )
    return "\n\n".join([origin(results), note, markdown(head, rows)])


def _loss(results: Results, cell: str) -> str:
    mean = results.mean(cell, "loss")
    if results.seeds(cell) == 1:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {results.deviation(cell, 'loss'):.3f}"


def _of_the_way(results: Results, cell: str) -> str:
    mean, narrow, wide = (results.mean(name, "loss") for name in (cell, NARROW, WIDE))
    if mean is None or narrow is None or wide is None:
        return "-"
    return f"{100 * (narrow - mean) / (narrow - wide):.0f} %"


def _mean_loss_at(results: Results, cell: str, seconds: float) -> float:
    curves = zip(results.values(cell, "seconds_then"), results.values(cell, "losses"), strict=True)
    losses = [loss_at(seconds, clock, curve) for clock, curve in curves]
    return sum(losses) / len(losses)


def loss_at(seconds: float, clock: list[float], losses: list[float]) -> float:
    """Between two validations linearly; after the last it stays."""
    for (begin, end), (before, after) in zip(pairwise(clock), pairwise(losses), strict=True):
        if begin <= seconds <= end and end > begin:
            share = (seconds - begin) / (end - begin)
            return before + share * (after - before)
    return losses[-1]


def plot(results: Results, path: Path) -> None:
    made, (left, right) = figures(1, 2, figsize=(14, 6), sharey=True)
    lowest = math.inf
    for number, cell in enumerate(results.records):
        curves = results.values(cell, "losses")
        if not curves:
            continue
        style = "--" if "dense" in cell else ":" if "experts" in cell else "-"
        color = f"C{number % 10}"
        losses = torch.tensor(curves).mean(0).tolist()
        lowest = min(lowest, losses[-1])
        for axes, x in ((left, "tokens"), (right, "seconds_then")):
            points = torch.tensor(results.values(cell, x)).double().mean(0).tolist()
            axes.plot(points, losses, style, color=color, label=cell, lw=1.2)
    for axes, label in ((left, "tokens"), (right, "seconds of training, one thread")):
        axes.set_xlabel(label)
        axes.grid(alpha=0.2)
    if lowest < math.inf:
        left.set_ylim(lowest - 0.05, lowest + 1)
    left.set(ylabel="validation loss, nats a byte", title="Python's standard library, byte by byte")
    legend(right, fontsize=7)
    save(made, path)


EXPERIMENT = Experiment(
    name="language_model",
    question="Trees, dense layers and experts as the blocks of a small language model.",
    cells=tuple(Cell(name, settings) for name, settings in CELLS.items()),
    run=run,
    table=table,
    plot=plot,
    seeds=3,
)
