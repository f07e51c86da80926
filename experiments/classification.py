"""One run on Fashion-MNIST: a layer 784 -> 10 trained, its epoch chosen, its test accuracy read."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from examples.data import DEVIATION, MEAN, Images, Split, fashion_mnist, locate
from examples.schedule import warm_cosine
from torch_fff import FFF, UltraFFF, recipes
from torch_fff.diagnostics import soft_output

from .experiment import Figures
from .layers import Layer
from .training import Recipe, parameters, prepare, schedule

SPLIT_BY = 8192  # training images that first decisions are made from


@dataclass(frozen=True)
class Settings:
    """recipe: None for a dense layer.

    decay: of the learning rate, "cosine" (after a warmup of 3 %) or "none".
    centred: pixels in [-1, 1] instead of zero mean and unit variance.
    node_lr_scale, tree_lr_scale: learning rates of routing and of what only some inputs reach,
        relative; weight decay is then for matrices of leaves and dense layers only
        (torch_fff.recipes.parameter_groups). Both None: one group of all parameters.
    """

    layer: Layer
    recipe: Recipe | None = None
    epochs: int = 20
    batch_size: int = 256
    optimizer: str = "adamw"
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    decay: str = "cosine"
    centred: bool = False
    node_lr_scale: float | None = None
    tree_lr_scale: float | None = None


def run(settings: Settings, seed: int) -> Figures:
    """Trains on 54000 images; the epoch with the best hard validation accuracy counts.

    Returns:
        test, memorisation, validation, soft_validation: accuracies in [0, 1] with hard routing
        (soft: with soft) on the test, training and validation images; epoch: the chosen one;
        entropy: mean over the decisions that validation images meet, nats; leaves_used by these,
        leaves; seconds: of training, of the one thread that computes, without waiting for other
        programs. A dense layer has no soft_validation, entropy or leaves.
    """
    images = _images(settings.centred)
    torch.manual_seed(seed)
    inputs, outputs = images.train.pixels.shape[1], len(images.classes)
    layer = settings.layer.build(inputs, outputs)
    epoch, seconds = train(layer, images, settings)
    recipes.fold(layer)
    figures: Figures = {
        "test": accuracy(layer, images.test),
        "memorisation": accuracy(layer, images.train),
        "validation": accuracy(layer, images.validation),
        "epoch": epoch,
        "seconds": round(seconds, 2),
    }
    if isinstance(layer, FFF | UltraFFF):
        pixels = images.validation.pixels
        report = layer.report(pixels, soft=False)
        figures["soft_validation"] = hits(soft_output(layer, pixels), images.validation)
        figures["entropy"] = report.decision_entropy
        figures |= {"leaves_used": report.leaves_used, "leaves": report.leaves}
    return figures


def train(layer: nn.Module, images: Images, settings: Settings) -> tuple[int, float]:
    """In place, to the weights and slope of the chosen epoch; (that epoch, seconds of training)."""
    batches = len(images.train) // settings.batch_size
    steps = settings.epochs * batches
    optimizer = _optimizer(layer, settings)
    rates = [group["lr"] for group in optimizer.param_groups]
    course = None
    if settings.recipe:
        prepare(layer, settings.recipe, images.train.pixels[:SPLIT_BY])
        course = schedule(settings.recipe, layer)
    best, chosen, state, slope, seconds = -1.0, 0, layer.state_dict(), 1.0, 0.0
    for epoch in range(settings.epochs):
        begin = time.process_time()
        layer.train()
        order = torch.randperm(len(images.train))[: batches * settings.batch_size]
        for step, rows in enumerate(order.view(batches, -1), epoch * batches):
            if course:
                course.apply(layer, step / steps)
            if settings.decay == "cosine":
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * warm_cosine(step, steps)
            batch = images.train[rows]
            loss = cross_entropy(layer(batch.pixels), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds += time.process_time() - begin
        validation = accuracy(layer, images.validation)
        if validation > best:
            best, chosen, state = validation, epoch, copy.deepcopy(layer.state_dict())
            slope = getattr(layer, "slope", 1.0)
    layer.load_state_dict(state)
    if isinstance(layer, FFF | UltraFFF):
        layer.slope = slope
    return chosen, seconds


def _optimizer(layer: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[settings.optimizer]
    rates = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    scales = settings.node_lr_scale, settings.tree_lr_scale
    return kind(parameters(layer, *scales, **rates), **rates)


def _images(centred: bool) -> Images:
    images = fashion_mnist(locate())
    if centred:
        for split in (images.train, images.validation, images.test):
            centre_(split.pixels)
    return images


def centre_(pixels: Tensor) -> Tensor:
    """Pixels of zero mean and unit variance become (p - 0.5) / 0.5, p in [0, 1]."""
    return pixels.mul_(DEVIATION).add_(MEAN - 0.5).div_(0.5)


@torch.inference_mode()
def accuracy(layer: nn.Module, split: Split) -> float:
    return hits(layer.eval()(split.pixels), split)


def hits(output: Tensor, split: Split) -> float:
    return (output.argmax(1) == split.labels).float().mean().item()
