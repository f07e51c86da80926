"""What a conversion reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockReport:
    """One converted block.

    name: of the block in the model.
    leaf_width: of its trees.
    initial_error, error: sum |y - y_dense|^2 / sum |y_dense - mean(y_dense)|^2 over the held-out
        tokens, before and after distillation; y_dense is what the dense block gives for the inputs
        that it was distilled on.
    tokens, held_out_tokens: that the block was converted and measured with.
    multiplies, dense_multiplies: for a token, decisions included.
    parameters, dense_parameters: of the layer and of the block that it replaces.
    seconds: spent, without collecting the inputs.
    """

    name: str
    leaf_width: int
    initial_error: float
    error: float
    tokens: int
    held_out_tokens: int
    multiplies: int
    dense_multiplies: int
    parameters: int
    dense_parameters: int
    seconds: float

    @property
    def fraction(self) -> float:
        """Of the dense block's multiplies."""
        return self.multiplies / self.dense_multiplies


@dataclass(frozen=True)
class ConversionReport:
    """All blocks that were converted; prints as a table."""

    blocks: list[BlockReport]

    @property
    def fraction(self) -> float:
        """Of the dense blocks' multiplies, over all blocks."""
        dense = sum(block.dense_multiplies for block in self.blocks)
        return sum(block.multiplies for block in self.blocks) / dense if dense else 1.0

    def __str__(self) -> str:
        header = ("block", "error, held out", "at first", "multiplies", "parameters", "seconds")
        rows = [
            (
                block.name,
                f"{block.error:.4f}",
                f"{block.initial_error:.4f}",
                f"{block.fraction:.3f}",
                f"{block.parameters / block.dense_parameters:.2f}",
                f"{block.seconds:.1f}",
            )
            for block in self.blocks
        ]
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = [
            " | ".join(
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in (header, *rows)
        ]
        rule = "-|-".join("-" * width for width in widths)
        return "\n".join((lines[0], rule, *lines[1:]))
