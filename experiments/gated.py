"""A hard tree whose leaf counts by its probability, the way a mixture's expert does."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from torch_fff import FFF, functional

from .balanced import leaf_balance


class GatedTree(FFF):
    r"""An FFF that computes one leaf a token, scaled by the probability of its path, in training
    and in inference.

    y = p(x) leaf(x), with p the product of sigmoid(slope |s|) over the scores s of the path: that
    of the leaf in the soft tree of the same slope. Decisions learn through p alone, so that no
    other leaf is evaluated, and from the balance of the leaves
    (torch_fff.losses.leaf_balance_loss), of weight ``balance``, with the gradient of all nodes.

    Shape: [..., in] -> [..., out].
    """

    def __init__(
        self,
        input_width: int,
        leaf_width: int,
        output_width: int,
        depth: int,
        activation: str,
        *,
        slope: float = 1.0,
        balance: float = 0.01,  # as that of the mixtures of experts
    ) -> None:
        sizes = input_width, leaf_width, output_width, depth
        super().__init__(*sizes, activation, train_hardened=True, slope=slope, balance=balance)

    def _hard(self, x: Tensor) -> tuple[Tensor, None, Tensor | None]:
        weights = self._tree_weights()
        output, scores, _ = functional.tree(x, *weights, leaf_activation=self.activation)
        # The tree turns right at a score of 0 or more, so that |s| is the score of the side taken.
        path = F.logsigmoid(self.slope * scores.abs()).sum((-2, -1)).exp()
        output = path.unsqueeze(-1).to(output.dtype) * output
        if not (self.training and self.balance):
            return output, None, None
        return output, None, leaf_balance(self, x)
