"""A first FFF from a dense block, by co-activation: which tokens go together, and the neurons that
matter to them.

The neurons are dealt to the trees. A tree's nodes split tokens in two, over and over, by what its
neurons say to them; a leaf holds copies of the neurons that vary most over its tokens, and what the
others contribute there is approximated from these.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .fff import FFF
from .reference import ACTIVATIONS

_FEWEST_TOKENS = 32  # a smaller region teaches nothing about itself and is taken for its parent
_RIDGE = 1e-2  # relative to the mean eigenvalue


@dataclass(frozen=True)
class Dense:
    """A dense block, neurons as rows: w1 [hidden, in], b1 [hidden], w2 [hidden, out], b2 [out]."""

    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    activation: str

    def hidden(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](F.linear(x, self.w1, self.b1))

    def __call__(self, x: Tensor) -> Tensor:
        return self.hidden(x) @ self.w2 + self.b2


def error_weights(y: Tensor) -> Tensor:
    """Weights [out] of squared errors: 1 / standard deviation.

    That lies between the plain squared error, which a few dimensions with outliers dominate, and
    one in which all dimensions count alike, however little they carry. Scaled so that the error of
    the mean has a loss of 1.
    """
    deviation = y.std(0, correction=0)
    tiny = torch.finfo(y.dtype).tiny ** 0.5
    weights = 1 / (deviation / deviation.max().clamp(min=tiny)).clamp(min=1e-3)
    size = (weights * y.square().mean(0)).mean()
    of_mean = (weights * deviation.square()).mean()
    return weights / torch.maximum(of_mean, torch.finfo(y.dtype).eps * size).clamp(min=tiny)


@torch.no_grad()
def initialise(
    layer: FFF, dense: Dense, x: Tensor, importance: Tensor, generator: torch.Generator | None
) -> None:
    """Fill ``layer`` with the neurons of ``dense``, from tokens ``x`` [tokens, in].

    ``importance`` [out] weighs the output's dimensions. A leaf holds at most the neurons of its
    tree; rows beyond those are zero.
    """
    hidden = dense.hidden(x)
    gain = (dense.w2.square() * importance).sum(1).sqrt()
    contribution = (hidden - hidden.mean(0)) * gain
    by_energy = contribution.square().sum(0).argsort(descending=True)
    layer.w1.zero_()
    layer.b1.zero_()
    layer.w2.zero_()
    trees = layer.parallel_size
    for tree in range(trees):
        neurons = by_energy[tree::trees]
        regions = [torch.arange(len(x), device=x.device)]
        for node in range(layer.n_nodes):  # in heap order, so that children are appended in place
            tokens = regions[node]
            side = _two_means(contribution[tokens][:, neurons], generator)
            weight, bias = _hyperplane(x[tokens], side)
            row = tree * layer.n_nodes + node
            layer.node_weights[row] = weight
            layer.node_biases[row] = bias
            right = x[tokens] @ weight + bias >= 0
            for child in (tokens[~right], tokens[right]):
                regions.append(child if len(child) >= _FEWEST_TOKENS else tokens)
        for leaf, tokens in enumerate(regions[layer.n_nodes :], tree * layer.n_leaves):
            active = contribution[tokens][:, neurons]
            active = active - active.mean(0)
            best = active.square().sum(0).argsort(descending=True)
            kept, dropped = neurons[best[: layer.leaf_width]], neurons[best[layer.leaf_width :]]
            width = len(kept)
            layer.w1[leaf, :width] = dense.w1[kept]
            layer.b1[leaf, :width] = dense.b1[kept]
            lost = hidden[tokens][:, dropped] @ dense.w2[dropped]
            slope, constant = _regression(hidden[tokens][:, kept], lost)
            layer.w2[leaf, :width] = dense.w2[kept] + slope
            layer.b2[leaf] = dense.b2 / trees + constant


def _two_means(z: Tensor, generator: torch.Generator | None) -> Tensor:
    """Two clusters of the rows of z [tokens, features], none under 30 % of them: bool [tokens].

    k-means, started on both sides of the first principal component.
    """
    centred = z - z.mean(0)
    side = centred @ principal_axes(centred, 1, generator)[:, 0] > 0
    for _ in range(8):
        if side.all() or not side.any():  # tokens that are all alike
            break
        right, left = centred[side].mean(0), centred[~side].mean(0)
        lead = (centred - (left + right) / 2) @ (right - left)
        ordered = lead.sort().values
        low, high = ordered[int(0.3 * len(z))], ordered[int(0.7 * len(z))]
        side = lead > torch.zeros_like(low).clamp(low, high)
    return side


def principal_axes(centred: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """The first principal axes of the rows of centred [tokens, features], [features, count].

    They are orthonormal; found by a few rounds of power iteration, their signs by chance.
    """
    axes = torch.randn(centred.shape[1], count, generator=generator).to(centred)
    for _ in range(8):
        axes = torch.linalg.qr(centred.T @ (centred @ axes)).Q
    return axes


def _hyperplane(x: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    """(weight, bias) whose score tells ``side`` by its sign and has a standard deviation of 1."""
    slope, bias = _regression(x, torch.where(side, 1.0, -1.0).to(x)[:, None])
    weight = slope[:, 0]
    scale = 1 / (x @ weight).std(correction=0).clamp(min=1e-3)
    return weight * scale, bias[0] * scale


def _regression(a: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Ridge regression y = a slope + constant: ([features, out], [out])."""
    mean_a, mean_y = a.mean(0), y.mean(0)
    a, y = a - mean_a, y - mean_y
    gram = a.T @ a
    ridge = _RIDGE * gram.diagonal().mean() + torch.finfo(a.dtype).tiny ** 0.5
    gram.diagonal().add_(ridge)
    slope = torch.linalg.solve(gram, a.T @ y)
    return slope, mean_y - mean_a @ slope
