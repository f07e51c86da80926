"""The time a case would take if only the machine's floors bounded it."""

from __future__ import annotations

from .case import SOFT, TRAINING, Case
from .floors import Floors
from .machine import Machine


def floor_seconds(case: Case, floors: Floors, machine: Machine, threads: int) -> float:
    """The largest of three: any call of a module; the arithmetic at the rate of the best matrix
    product; the bytes at the rate of the nearest memory that holds them.

    Tokens are taken to spread evenly over the tree; a row that several of them visit is read once.
    A soft layer computes all of it; with a threshold on the leaves' weights, one leaf per token at
    least. What a straight-through step evaluates beside the path is left out, and so is all
    indexing and sorting. A training step writes a gradient for every weight, visited or not.
    """
    rows = _Rows(case)
    read = rows.inputs * case.input_width + rows.outputs * case.output_width
    flops = 2 * case.tokens * rows.width_of_token()
    moved = read + case.tokens * (case.input_width + case.output_width)
    if case.step == TRAINING:
        flops *= 3
        # Backward reads rows, x and the output's gradient and writes that of x.
        moved += read + case.tokens * (2 * case.input_width + case.output_width)
    size = moved * case.itemsize
    if case.step == TRAINING:
        size += case.weight_bytes
    held = size + (case.layers - 1) * read * case.itemsize
    bandwidth = floors.read[_nearest(held, machine, threads)]
    return max(floors.call, flops / floors.flops[case.dtype], size / bandwidth)


class _Rows:
    """Rows of input and of output weights that all tokens together visit; expected numbers."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.everything = case.routing == SOFT and not case.prune
        nodes = case.trees * sum(self._distinct(2**level) for level in range(case.levels))
        leaves = case.trees * self._distinct(2**case.depth) * case.leaf_width
        self.inputs = nodes + leaves
        self.outputs = leaves if case.leaf_width else nodes

    def width_of_token(self) -> float:
        """Multiplications that one token costs."""
        case = self.case
        if self.everything:
            return self.inputs * case.input_width + self.outputs * case.output_width
        outputs = case.trees * (case.leaf_width or case.levels)
        return case.visited * case.input_width + outputs * case.output_width

    def _distinct(self, choices: int) -> float:
        """How many different ones are among as many uniform draws as there are tokens."""
        if self.everything:
            return choices
        return choices * (1 - (1 - 1 / choices) ** self.case.tokens)


def _nearest(size: float, machine: Machine, threads: int) -> str:
    if "L3" not in machine.caches:  # a GPU, whose L2 cache is one
        return "L2" if size <= machine.caches["L2"] else "DRAM"
    if size <= machine.caches["L2"] * threads:
        return "L2"
    return "L3" if size <= machine.caches["L3"] else "DRAM"
