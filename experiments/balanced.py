"""Hard training that balances the leaves, the way mixtures of experts do."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from torch_fff import FFF, functional, losses


class BalancedTree(FFF):
    """An FFF whose ``balance`` is, in hard training too, that of the leaves
    (torch_fff.losses.leaf_balance_loss) instead of the decisions', with the gradient of all nodes.

    Shape: [..., in] -> [..., out].
    """

    def _hard_balance(self, x: Tensor, scores: Tensor, leaf: Tensor) -> Tensor:
        return leaf_balance(self, x)


def leaf_balance(layer: FFF, x: Tensor) -> Tensor:
    """Of the soft mixture over the leaves that ``layer`` has at its slope."""
    scores = F.linear(x, layer.node_weights, layer.node_biases)
    by_tree = scores.unflatten(-1, (layer.parallel_size, layer.n_nodes))
    return losses.leaf_balance_loss(functional.leaf_mixture(layer.slope * by_tree))
