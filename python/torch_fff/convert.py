"""Conversion of the trained dense feedforward blocks of a model into trees, without retraining it.

One block after the other: its inputs are cached on calibration data, a first tree is made of copies
of its neurons, grouped by co-activation (see ``_grouping``), and the leaves are distilled with hard
paths to give what the dense block gives.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ._arguments import check_count, check_number, reject
from ._blocks import Block, find_feedforward
from ._calibration import block_inputs
from ._conversion_report import BlockReport, ConversionReport
from ._distil import distil
from ._grouping import Dense, error_weights, initialise
from .fff import FFF
from .hugging_face import write_config

__all__ = ["BlockReport", "ConversionReport", "Progress", "convert"]

_TOKENS_TO_GROUP = 16384  # of the calibration tokens, those that the first tree is made from
_HELD_OUT = 10  # every tenth batch


@dataclass(frozen=True)
class Progress:
    """Where a conversion is: ``block`` of ``blocks`` (from 0), ``step`` of ``steps`` in it, and the
    last loss (of the weighted squared error)."""

    name: str
    block: int
    blocks: int
    step: int
    steps: int
    loss: float


@dataclass(frozen=True)
class _Settings:
    """What decides the result, kept beside it in ``directory``."""

    fraction: float
    depth: int
    parallel_size: int
    sequential: bool
    steps: int
    learning_rate: float
    seed: int
    blocks: tuple[str, ...]


def convert(
    model: nn.Module,
    data: Iterable[Any],
    *,
    fraction: float = 0.25,
    depth: int = 3,
    parallel_size: int = 1,
    which: Iterable[int] | None = None,
    sequential: bool = True,
    steps: int = 400,
    learning_rate: float = 2e-3,
    directory: str | Path | None = None,
    progress: bool | Callable[[Progress], None] = False,
    seed: int = 0,
) -> ConversionReport:
    """Replace dense feedforward blocks of ``model`` by :class:`FFF` layers that imitate them.

    A block of ``hidden`` neurons becomes ``parallel_size`` trees of ``depth`` decisions, whose
    leaves are as wide as ``fraction`` of the block's multiplies allows, decisions included. A token
    then costs less, but the layer has about ``2**depth * fraction`` times the block's parameters.

    The leaves are copies of the block's neurons, chosen by what they do to the tokens that reach
    the leaf, and are then distilled on those with the routing fixed. Nothing else in the model
    changes, and the model is not trained as a whole; that is a good thing to do afterwards.

    The model runs in eval mode without gradients and is left in its mode. A block that a forward
    applies several times is distilled on the inputs of its first. If anything fails, or the
    conversion is interrupted, all blocks are as they were before the call.

    Args:
        model: with blocks h -> i -> h as in BERT, ViT, GPT-2 or ``nn.TransformerEncoderLayer``.
        data: batches, each a mapping of keyword arguments for the model, a tuple or list of
            positional ones, or one argument. Tokens hidden by an ``attention_mask`` do not count.
            Every tenth batch (or the last of fewer) is held out for the reported errors. Inputs and
            outputs of one block at a time are kept in memory: 20,000 to 60,000 tokens serve well.
        fraction: of a dense block's multiplies that a token may cost, in (0, 1].
        depth: of the trees. 0: one narrower dense network.
        parallel_size: number of trees, among which the block's neurons are dealt.
        which: indices of the blocks to convert, in the order of the model's modules; all by
            default.
        sequential: distil each block on the inputs that the converted blocks below produce, rather
            than on those of the original model.
        steps: of distillation per block, with batches of 1024 tokens.
        learning_rate: of AdamW.
        directory: where each finished block is kept; a call that finds some there, made with the
            same settings from the same weights, does not compute them anew. The data is taken to be
            the same too.
        progress: True for a bar on stderr, or a function that is called after each step.
        seed: of the order of the tokens.

    Returns:
        A report that prints as a table. A Hugging Face model can then be saved with
        ``save_pretrained`` and loaded with :func:`load_pretrained`; ``restore_feedforward`` puts
        the dense blocks back.

    Raises:
        ValueError: an argument is wrong; a block cannot be converted (gated, or of an activation
            that the layers lack), or is replaced already; ``directory`` holds another conversion.
        RuntimeError: the model's forward does not reach a block.
    """
    check_number("convert", "fraction", fraction, 0.0, 1.0)
    check_count("convert", "depth", depth, minimum=0)
    check_count("convert", "parallel_size", parallel_size)
    check_count("convert", "steps", steps, minimum=0)
    check_number("convert", "learning_rate", learning_rate)
    blocks = _chosen(find_feedforward(model), which)
    settings = _Settings(
        float(fraction),
        depth,
        parallel_size,
        sequential,
        steps,
        float(learning_rate),
        seed,
        tuple(block.name for block in blocks),
    )
    widths = [_leaf_width(block, settings) for block in blocks]
    batches = list(data)
    if len(batches) < 2:
        reject("convert", "data", "at least 2 batches", len(batches))
    apart = set(range(_HELD_OUT - 1, len(batches), _HELD_OUT)) or {len(batches) - 1}
    calibration = [batch for i, batch in enumerate(batches) if i not in apart]
    held_out = [batch for i, batch in enumerate(batches) if i in apart]
    show = _Bar() if progress is True else progress or (lambda state: None)

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    done: list[tuple[Block, FFF]] = []
    reports = []
    try:
        for i, (block, leaf_width) in enumerate(zip(blocks, widths, strict=True)):
            file = None if directory is None else Path(directory) / f"{block.name or 'block'}.pt"
            layer = _new_layer(block, leaf_width, settings)
            report = None if file is None else _load(file, layer, block, settings)
            if report is None:
                if not sequential:
                    for earlier, _ in done:
                        earlier.restore()
                x = block_inputs(model, block, calibration)
                x_test = block_inputs(model, block, held_out)
                if not sequential:
                    for earlier, layer_there in done:
                        earlier.replace_with(layer_there)
                state = Progress(block.name, i, len(blocks), 0, steps, float("nan"))
                report = _convert_block(block, layer, x, x_test, settings, state, show)
                if file is not None:
                    _save(file, layer, block, settings, report)
            layer.to(block.linear_in.dtype)
            block.replace_with(layer.eval())
            done.append((block, layer))
            reports.append(report)
    except BaseException:
        for block, _ in done:
            block.restore()
        raise
    finally:
        if isinstance(show, _Bar):
            show.close()
        for module, training in modes:
            module.training = training
    for _, layer in done:
        layer.train(model.training)
    write_config(model)
    return ConversionReport(reports)


def _chosen(blocks: list[Block], which: Iterable[int] | None) -> list[Block]:
    if not blocks:
        reject("convert", "model", "a model with feedforward blocks", "one without")
    indices = range(len(blocks)) if which is None else sorted(set(which))
    for index in indices:
        check_count("convert", "which", index, minimum=0)
        if index >= len(blocks):
            reject("convert", "which", f"indices below {len(blocks)}", index)
    for block in (chosen := [blocks[index] for index in indices]):
        if block.replacement is not None:
            reject("convert", "model", f"{block.name} as it was", "a replaced block: restore it")
        if block.kind == "gated":
            reject("convert", "model", f"{block.name} without a gate", "a gated block")
        if block.activation is None:
            known = "an activation that the layers know (relu, gelu, gelu_tanh, silu, identity)"
            reject("convert", "model", f"{block.name} with {known}", block.activation_function)
    return chosen


def _leaf_width(block: Block, settings: _Settings) -> int:
    """As wide as the budget allows, and no wider than the neurons that a tree is dealt."""
    neuron = block.input_width + block.output_width
    trees, hidden = settings.parallel_size, block.intermediate_width
    budget = settings.fraction * hidden * neuron / trees - settings.depth * block.input_width
    width = min(int(budget / neuron + 1e-9), hidden // trees)
    if width < 1:
        least = trees * (settings.depth * block.input_width + neuron) / (hidden * neuron)
        expected = f"at least {least:.4g} for these trees in {block.name}"
        if trees > hidden:
            reject("convert", "parallel_size", f"at most the {hidden} neurons of a block", trees)
        reject("convert", "fraction", expected, settings.fraction)
    return width


def _new_layer(block: Block, leaf_width: int, settings: _Settings) -> FFF:
    weight = block.linear_in
    return FFF(
        block.input_width,
        leaf_width,
        block.output_width,
        settings.depth,
        block.activation or "",
        train_hardened=True,
        parallel_size=settings.parallel_size,
        routing_gradient="none",
        device=weight.device,
        dtype=torch.promote_types(weight.dtype, torch.float32),
    )


def _convert_block(
    block: Block,
    layer: FFF,
    x: Tensor,
    x_test: Tensor,
    settings: _Settings,
    state: Progress,
    show: Callable[[Progress], None],
) -> BlockReport:
    began = time.perf_counter()
    dense = _dense(block, layer.w1.dtype)
    generator = torch.Generator().manual_seed(settings.seed)
    x, x_test = x.to(layer.w1.dtype), x_test.to(layer.w1.dtype)
    with torch.no_grad():
        y, y_test = (torch.cat([dense(part) for part in t.split(4096)]) for t in (x, x_test))
    weights = error_weights(y)
    subset = torch.randperm(len(x), generator=generator)[:_TOKENS_TO_GROUP].to(x.device)
    initialise(layer, dense, x[subset], weights, generator)
    initial_error = _relative_error(layer, x_test, y_test)
    distil(
        layer.train(),
        x,
        y,
        weights,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        generator=generator,
        on_step=lambda step, loss: show(replace(state, step=step, loss=loss)),
    )
    neuron = block.input_width + block.output_width
    path = layer.depth * block.input_width + layer.leaf_width * neuron
    return BlockReport(
        name=block.name,
        leaf_width=layer.leaf_width,
        initial_error=initial_error,
        error=_relative_error(layer, x_test, y_test),
        tokens=len(x),
        held_out_tokens=len(x_test),
        multiplies=layer.parallel_size * path,
        dense_multiplies=block.intermediate_width * neuron,
        parameters=sum(p.numel() for p in layer.parameters()),
        dense_parameters=sum(p.numel() for p in block.parameters()),
        seconds=time.perf_counter() - began,
    )


def _dense(block: Block, dtype: torch.dtype) -> Dense:
    def bias(given: Tensor | None, width: int) -> Tensor:
        zeros = block.linear_in.new_zeros(width)
        return (zeros if given is None else given).detach().to(dtype)

    return Dense(
        w1=block.linear_in.detach().to(dtype),
        b1=bias(block.bias_in, block.intermediate_width),
        w2=block.linear_out.detach().T.to(dtype).contiguous(),
        b2=bias(block.bias_out, block.output_width),
        activation=block.activation or "",
    )


@torch.no_grad()
def _relative_error(layer: FFF, x: Tensor, y: Tensor) -> float:
    training = layer.training
    error = (layer.eval()(x) - y).square().sum()
    layer.train(training)
    spread = (y - y.mean(0)).square().sum()
    return float(error / spread.clamp(min=torch.finfo(y.dtype).tiny))


def _fingerprint(block: Block) -> float:
    """Of the dense weights, so that a stored result is not taken for another model's."""
    return sum(float(p.detach().double().abs().sum()) for p in block.parameters())


def _save(file: Path, layer: FFF, block: Block, settings: _Settings, report: BlockReport) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".tmp")
    torch.save(
        {
            "settings": asdict(settings),
            "fingerprint": _fingerprint(block),
            "report": asdict(report),
            "layer": layer.state_dict(),
        },
        unfinished,
    )
    unfinished.replace(file)  # whole or not at all


def _load(file: Path, layer: FFF, block: Block, settings: _Settings) -> BlockReport | None:
    if not file.exists():
        return None
    stored = torch.load(file, map_location=layer.w1.device, weights_only=True)
    if not isinstance(stored, dict) or "settings" not in stored:
        _reject_stored(file, "blocks that convert has stored", "something else")
    for key, value in asdict(settings).items():
        if (other := stored["settings"].get(key)) != value:
            _reject_stored(file, f"{key}={value!r}", f"{key}={other!r}")
    expected, got = _fingerprint(block), stored["fingerprint"]
    if abs(expected - got) > 1e-6 * abs(expected):
        _reject_stored(file, "a conversion of these weights", "one of others")
    layer.load_state_dict(stored["layer"])
    return BlockReport(**stored["report"])


def _reject_stored(file: Path, expected: str, got: str) -> NoReturn:
    reject("convert", "directory", expected, f"{got} in {file}")


class _Bar:
    """One line on stderr that is rewritten."""

    def __init__(self) -> None:
        self._shown = 0.0

    def __call__(self, state: Progress) -> None:
        now = time.monotonic()
        if now - self._shown < 0.2 and state.step < state.steps:
            return
        self._shown = now
        filled = 20 * state.step // state.steps
        bar = "#" * filled + "." * (20 - filled)
        where = f"{state.block + 1}/{state.blocks} {state.name}"
        text = f"\r{where:32} [{bar}] {state.step}/{state.steps} loss {state.loss:.4f}"
        print(text, end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._shown:
            print(file=sys.stderr)
