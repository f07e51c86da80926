"""A hard tree whose leaf counts by its probability, the way a mixture's expert does."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from torch_fff import FFF, functional, losses


class GatedTree(FFF):
    r"""An FFF that computes one leaf a token, scaled by the probability of its path, in training
    and in inference.

    y = p(x) leaf(x), with p the product of sigmoid(slope |s|) over the scores s of the path: that
    of the leaf in the soft tree of the same slope. Decisions learn through p alone, so that no
    other leaf is evaluated.

    A training forward leaves ``balance_loss`` (torch_fff.losses.leaf_balance_loss), with the
    gradient of all nodes: 1 when balanced, ``n_leaves`` when one leaf gets every token.

    Shape: [..., in] -> [..., out].
    """

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        output, scores, _ = functional.tree(
            x,
            self.node_weights,
            self.node_biases,
            None,
            self.w1,
            self.b1,
            self.w2,
            self.b2,
            leaf_activation=self.activation,
        )
        if self.training:
            logits = F.linear(x, self.node_weights, self.node_biases)
            mixture = functional.leaf_mixture(self.slope * logits)
            self.balance_loss = losses.leaf_balance_loss(mixture.unsqueeze(-2))
        # The tree turns right at a score of 0 or more, so that |s| is the score of the side taken.
        path = F.logsigmoid(self.slope * scores.abs()).sum((-2, -1)).exp()
        return path.unsqueeze(-1).to(output.dtype) * output
