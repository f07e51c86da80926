"""What reaches a feedforward block of a model: its inputs on some data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._blocks import Block


class _Arrived(Exception):
    """The block has been reached; the rest of the forward is not needed."""


@torch.no_grad()
def block_inputs(model: nn.Module, block: Block, batches: Iterable[Any]) -> Tensor:
    """Inputs of ``block`` [tokens, in], without the tokens that a batch's ``attention_mask`` hides.

    A batch is a mapping of keyword arguments, a tuple or list of positional ones, or one argument.

    Raises:
        RuntimeError: the model's forward does not reach the block.
    """
    inputs: list[Tensor] = []
    mask: Tensor | None = None

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0]
        tokens = x.flatten(0, -2)
        if mask is not None and mask.shape == x.shape[:-1]:
            tokens = tokens[mask.flatten().to(x.device) != 0]
        inputs.append(tokens.clone())
        raise _Arrived

    handle = block.entry.register_forward_pre_hook(keep)
    try:
        for batch in batches:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            try:
                if isinstance(batch, Mapping):
                    model(**batch)
                elif isinstance(batch, tuple | list):
                    model(*batch)
                else:
                    model(batch)
            except _Arrived:
                continue
            raise RuntimeError(
                f"convert: model: expected a forward that reaches the block {block.name}, got one "
                "that does not"
            )
    finally:
        handle.remove()
    return torch.cat(inputs)
