"""Swapping the feedforward blocks of a model for fast ones, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ._activation import activation_name
from ._arguments import reject
from ._blocks import Block, find_feedforward
from ._options import build_layer, parameters_per_token
from ._table import aligned
from .hugging_face import write_config

__all__ = ["ReplacedBlock", "Replacement", "replace_feedforward", "restore_feedforward"]

_OWNER = "replace_feedforward"
Which = Iterable[int | str] | Callable[[str], bool] | None


@dataclass(frozen=True)
class ReplacedBlock:
    """Counts of one block; "per token" are the parameters that a token touches in inference."""

    name: str
    kind: str
    parameters_before: int
    parameters: int
    parameters_per_token: int

    @property
    def fraction(self) -> float:
        """Of the original block's parameters, all of which every token touched."""
        return self.parameters_per_token / self.parameters_before


@dataclass(frozen=True)
class Replacement:
    """What :func:`replace_feedforward` did, or with ``dry_run`` would do; prints as a table."""

    layer: str
    rows: tuple[ReplacedBlock, ...]
    dry_run: bool
    _model: nn.Module = field(repr=False)
    _blocks: tuple[Block, ...] = field(repr=False)

    @property
    def total(self) -> ReplacedBlock:
        """All blocks added up."""
        return ReplacedBlock(
            "total",
            "",
            sum(row.parameters_before for row in self.rows),
            sum(row.parameters for row in self.rows),
            sum(row.parameters_per_token for row in self.rows),
        )

    def restore(self) -> None:
        """Put the original modules back; see :func:`restore_feedforward`."""
        _restore(self._model, self._blocks)

    def __str__(self) -> str:
        cells = [["block", "kind", "parameters before", "now", "touched per token", "of before"]]
        for row in (*self.rows, self.total):
            counts = (row.parameters_before, row.parameters, row.parameters_per_token)
            numbers = (f"{count:,}" for count in counts)
            cells.append([row.name, row.kind, *numbers, f"{row.fraction:.2%}"])
        count = f"{len(self.rows)} feedforward block{'s' if len(self.rows) > 1 else ''}"
        what = f"{count} {'would become' if self.dry_run else 'became'} {self.layer}"
        return "\n".join([what, *aligned(cells, left=2)])


def replace_feedforward(
    model: nn.Module,
    layer: str = "ultra",
    *,
    which: Which = None,
    activation: nn.Module | str | None = None,
    dry_run: bool = False,
    reversible: bool = True,
    **options: Any,
) -> Replacement:
    """Replace the feedforward blocks of ``model``, in place, by :class:`UltraFFF` or :class:`FFF`.

        report = replace_feedforward(model, depth=11)  # UltraFFF 1x11 in every block
        report = replace_feedforward(model, "fff", depth=7, leaf_width=32, which=range(6))

    Blocks are found by their structure: h -> i, activation, i -> h in one module or in two
    neighbours (BERT, RoBERTa, DistilBERT, ViT, GPT-2, ``nn.TransformerEncoderLayer`` and
    ``DecoderLayer``, ``nn.Sequential``, others built alike), or gated with three linear maps
    (Llama, Mistral). What surrounds a block stays: dropout of its output, residual, norm. Dropout
    of its hidden neurons goes where it can be told apart (``FFF`` has a ``dropout`` of its own).

    A gated block, down(act(gate(x)) * up(x)), is replaced as a whole by one layer: nothing in a
    tree corresponds to the gate, whose work the choice of the path takes over. Only the
    activation's name is taken from it.

    The new layers have fresh weights (see :func:`torch_fff.convert` for trained ones), the block's
    widths, device, dtype and mode, and its activation unless one is given. An ``UltraFFF`` has no
    output bias unless asked for (``output_bias=True``).

    ``nn.TransformerEncoder`` computes whole layers in one fused kernel in inference, and drops
    padding by nested tensors; both are turned off for replaced layers. Call this on the model that
    holds the encoder.

    Of a Hugging Face model the configuration goes into ``model.config.torch_fff``, with which
    :func:`torch_fff.load_pretrained` loads what ``save_pretrained`` wrote. For any other model,
    build it, replace with the same arguments, and ``load_state_dict``.

    Args:
        model: any module with feedforward blocks.
        layer: "ultra" or "fff".
        which: indices or names of blocks, or a predicate on names; None for all. Indices count all
            of ``model``'s blocks, in order, whether replaced or not; a dry run shows the names.
        activation: of the new layers, as for their constructors.
        dry_run: only report.
        reversible: keep the original modules, so that they can be restored; they take memory, but
            are no part of the model's parameters or state dict.
        options: of the layer, such as ``depth`` (always), ``leaf_width`` ("fff"),
            ``parallel_size``, ``routing_gradient``, ``output_bias``, ``shared_level_base``
            ("ultra") or ``shared_leaf_base`` ("fff").

    Raises:
        ValueError: no block is found or selected; one is replaced already; the operators do not
            know its activation; an option is wrong. The model is then as before.
    """
    blocks = _select(find_feedforward(model), which, model)
    layers = []
    for block in blocks:
        if block.replacement is not None:
            expected = "blocks that are not replaced (see restore_feedforward)"
            reject(_OWNER, "which", expected, block.name)
        weight = block.linear_in
        new = build_layer(
            _OWNER,
            layer,
            {**options, "activation": _activation(block, activation)},
            block.input_width,
            block.output_width,
            "meta" if dry_run else weight.device,
            weight.dtype,
        )
        layers.append(new)
    rows = tuple(
        ReplacedBlock(
            block.name,
            block.kind,
            sum(parameter.numel() for parameter in block.parameters()),
            sum(parameter.numel() for parameter in new.parameters()),
            parameters_per_token(new),
        )
        for block, new in zip(blocks, layers, strict=True)
    )
    if not dry_run:
        for block, new in zip(blocks, layers, strict=True):
            block.replace_with(new)
            if not reversible:
                block.discard()
        write_config(model)
    return Replacement(type(layers[0]).__name__, rows, dry_run, model, tuple(blocks))


def restore_feedforward(model: nn.Module) -> int:
    """Put the original modules of all replaced blocks back; returns how many there were.

    Their weights are those from before the replacement, in the replacement's present device, dtype
    and mode.

    Raises:
        ValueError: no block is replaced, or with ``reversible=False``.
    """
    blocks = [block for block in find_feedforward(model) if block.replacement is not None]
    if not blocks:
        reject("restore_feedforward", "model", "replaced blocks", type(model).__name__)
    _restore(model, blocks)
    return len(blocks)


def _restore(model: nn.Module, blocks: Iterable[Block]) -> None:
    for block in blocks:
        block.restore()
    write_config(model)


def _select(blocks: list[Block], which: Which, model: nn.Module) -> list[Block]:
    if not blocks:
        expected = "a model with feedforward blocks (linear maps h -> i -> h with an activation)"
        reject(_OWNER, "model", expected, type(model).__name__)
    if which is None:
        return blocks
    if callable(which):
        selected = [block for block in blocks if which(block.name)]
    else:
        if isinstance(which, str) or not isinstance(which, Iterable):
            reject(_OWNER, "which", "indices, names or a predicate on names", which)
        wanted = list(which)
        names = [block.name for block in blocks]
        for one in wanted:
            known = range(-len(blocks), len(blocks)) if type(one) is int else names
            if one not in known:
                shown = f"indices < {len(blocks)} or names such as {names[0]!r}"
                reject(_OWNER, "which", shown, one)
        indices = {
            names.index(one) if isinstance(one, str) else one % len(blocks) for one in wanted
        }
        selected = [blocks[index] for index in sorted(indices)]
    if not selected:
        reject(_OWNER, "which", f"some of the {len(blocks)} blocks", "none")
    return selected


def _activation(block: Block, activation: nn.Module | str | None) -> str:
    if activation is not None:
        return activation_name(_OWNER, "activation", activation)
    if block.activation is None:
        expected = f"one to be given, as the operators do not know that of {block.name}"
        reject(_OWNER, "activation", expected, block.activation_function)
    return block.activation
