"""Names and layouts of the published checkpoints, and errors for those that do not fit.

A layer's own layout keeps a neuron's weights in a row; the published ones do not everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Entry(NamedTuple):
    published: str
    own: str
    dim: int  # of the published tensor
    to_own: Callable[[Tensor], Tensor]
    to_published: Callable[[Tensor], Tensor]


def _same(t: Tensor) -> Tensor:
    return t


def _swap_last(t: Tensor) -> Tensor:
    return t.transpose(-1, -2).contiguous()


# PyPI fastfeedforward, and the master leaf of arXiv 2405.16836 ("magic_*", "k").
FAST_FEEDFORWARD = (
    Entry("node_weights", "node_weights", 2, _same, _same),
    Entry("node_biases", "node_biases", 2, lambda t: t.flatten(), lambda t: t.unsqueeze(-1)),
    Entry("w1s", "w1", 3, _swap_last, _swap_last),
    Entry("b1s", "b1", 2, _same, _same),
    Entry("w2s", "w2", 3, _same, _same),
    Entry("b2s", "b2", 2, _same, _same),
    Entry(
        "magic_w1",
        "master_w1",
        3,
        lambda t: _swap_last(t).squeeze(0),
        lambda t: _swap_last(t[None]),
    ),
    Entry("magic_b1", "master_b1", 2, lambda t: t.squeeze(0), lambda t: t[None]),
    Entry("magic_w2", "master_w2", 3, lambda t: t.squeeze(0), lambda t: t[None]),
    Entry("magic_b2", "master_b2", 2, lambda t: t.squeeze(0), lambda t: t[None]),
    Entry("k", "master_logit", 0, _same, _same),
    Entry("node_usage", "node_usage", 1, _same, _same),
    Entry("leaf_usage", "leaf_usage", 1, _same, _same),
)

# UltraFastBERT's training layer.
ULTRA_FAST_BERT = (
    Entry("linear_in.weight", "node_weights", 2, _same, _same),
    Entry("linear_in.bias", "node_biases", 1, _same, _same),
    Entry("linear_out.weight", "node_outputs", 2, _swap_last, _swap_last),
)


def to_own(state: Mapping[str, Any], prefix: str, entries: Iterable[Entry]) -> dict[str, Any]:
    """A copy of ``state`` with the published names under ``prefix`` replaced; own names stay."""
    result = dict(state)
    for entry in entries:
        value = result.get(prefix + entry.published)
        # What does not have the published form stays as it is, for load_state_dict to judge.
        if isinstance(value, Tensor) and value.dim() == entry.dim:
            del result[prefix + entry.published]
            result[prefix + entry.own] = entry.to_own(value)
    return result


def to_published(state: Mapping[str, Tensor], entries: Iterable[Entry]) -> dict[str, Tensor]:
    """``state``, a layer's own, under the published names."""
    return {e.published: e.to_published(state[e.own]) for e in entries if e.own in state}


def misfits(
    owner: str,
    state: Mapping[str, Any],
    prefix: str,
    expected: Mapping[str, tuple[tuple[str, int], ...]],
) -> list[str]:
    """What the constructor arguments should have been: one sentence for each that does not fit.

    ``expected`` maps own names to the meaning and size of each dimension.
    """
    sentences = {}
    for name, sizes in expected.items():
        value = state.get(prefix + name)
        if not isinstance(value, Tensor) or value.dim() != len(sizes):
            continue
        for (meaning, size), got in zip(sizes, value.shape, strict=True):
            if got != size:
                sentences[meaning] = (
                    f"{owner}: {meaning}: expected {size}, the checkpoint has {got}"
                )
    return list(sentences.values())
