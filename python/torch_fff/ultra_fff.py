"""The UltraFFF layer: trees of neurons."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from ._activation import activation_name
from ._arguments import check_count, reject
from ._checkpoint import ULTRA_FAST_BERT, misfits, to_own, to_published
from ._inspected import Inspected
from ._routing import (
    STRAIGHT_THROUGH,
    check_routing,
    decision_noise,
    drawn_alternates,
    tree_weights,
)

_WEIGHTS = ("node_weights", "node_biases", "node_outputs", "output_bias")
_SHOWN_UNLESS_DEFAULT = (
    ("routing_gradient", "none"),
    ("slope", 1.0),
    ("noise", 0.0),
    ("alternates", None),
    ("min_slope", 0.0),
    ("row_sparse_grad", False),
)


class UltraFFF(Inspected, nn.Module):
    r"""UltraFastBERT's feedforward layer (arXiv 2311.10770): K trees of neurons, outputs added up.

    Every node is a neuron with an input row and an output row. A token visits depth + 1 nodes per
    tree, of ``n_nodes`` = 2^(depth + 1) - 1, from the root i = 0:

        s = <x, node_weights[i]> + node_biases[i];  y += act(s) * node_outputs[i];  i = 2i + 1 + [s
        > 0]

    (NaN: left). Paths are hard in training, too. With ``routing_gradient="none"``, as published,
    gradients flow through the activations of visited neurons only; "straight_through" adds to each
    decision on the path the gradient of sigmoid(slope * s), through what the two branches below it
    contribute. In training the decision is [slope * s + noise * logistic > 0]. ``alternates`` and
    ``min_slope`` make that gradient cheaper, see :class:`FFF`. ``slope``, ``noise``,
    ``alternates`` and ``min_slope`` are plain attributes that a schedule may change every step;
    under ``torch.compile`` each new value of one but ``noise`` is a compilation of its own.

    Args:
        input_width: last dimension of the input, ``in``.
        output_width: last dimension of the output, ``out``.
        depth: levels of decisions, >= 0; the tree has one level of neurons more.
        parallel_size: number of trees K.
        activation: nn.ReLU, nn.GELU, nn.SiLU or nn.Identity, or the operators' name of one.
        bias: whether neurons have a bias.
        output_bias: whether a bias, zero at first, is added to the sum of the trees. The published
            layer has none.
        routing_gradient: "none" or "straight_through".
        slope: of the straight-through sigmoid.
        noise: scale of the logistic noise on decisions in training.
        alternates: number of branches not taken that are evaluated per token and tree in training;
            None for all.
        min_slope: share of the sigmoid's greatest slope up to which a decision gets no gradient.
        row_sparse_grad: give the parameters gradients that are sparse tensors of the visited nodes,
            see :class:`FFF`; that of ``output_bias`` stays dense.
        device, dtype: of the parameters.

    Parameters: node_weights [K * n, in], node_biases [K * n] (None without ``bias``), node_outputs
    [K * n, out], output_bias [out] (None unless asked for). Trees lie one after the
    other, nodes in heap order.

    Shape: [..., in] -> [..., out], any leading dimensions, zero tokens included.

    Dtypes: float32, float64, bfloat16 or float16, one for input and parameters, or autocast. Scores
    are accumulated in float32 (float64 for float64).

    ``load_state_dict`` takes ``linear_in.weight``, ``linear_in.bias`` and ``linear_out.weight`` of
    UltraFastBERT's training layer as well as its own names; :meth:`published_state_dict` gives them
    back.

    Raises:
        ValueError: an argument of the constructor is wrong.
        RuntimeError: the input has another width, dtype or device than the parameters.
    """

    node_weights: Tensor
    node_biases: Tensor | None
    node_outputs: Tensor
    output_bias: Tensor | None

    def __init__(
        self,
        input_width: int,
        output_width: int,
        depth: int,
        parallel_size: int = 1,
        activation: nn.Module | str = nn.GELU(),  # noqa: B008
        bias: bool = True,
        *,
        output_bias: bool = False,
        routing_gradient: str = "none",
        slope: float = 1.0,
        noise: float = 0.0,
        alternates: int | None = None,
        min_slope: float = 0.0,
        row_sparse_grad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("UltraFFF", "input_width", input_width)
        check_count("UltraFFF", "output_width", output_width)
        check_count("UltraFFF", "depth", depth, minimum=0)
        check_count("UltraFFF", "parallel_size", parallel_size)
        check_routing("UltraFFF", routing_gradient, slope, noise, alternates, min_slope)

        self.input_width = input_width
        self.output_width = output_width
        self.depth = depth
        self.parallel_size = parallel_size
        self.n_nodes = 2 ** (depth + 1) - 1
        self.activation = activation_name("UltraFFF", "activation", activation)
        self.routing_gradient = routing_gradient
        self.slope = float(slope)
        self.noise = float(noise)
        self.alternates = alternates
        self.min_slope = float(min_slope)
        self.row_sparse_grad = row_sparse_grad

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        nodes = parallel_size * self.n_nodes
        self.register_parameter("node_weights", parameter(nodes, input_width))
        self.register_parameter("node_biases", parameter(nodes) if bias else None)
        self.register_parameter("node_outputs", parameter(nodes, output_width))
        self.register_parameter("output_bias", parameter(output_width) if output_bias else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew, as published: uniform in +-1 / sqrt(fan-in), a token's
        ``parallel_size * (depth + 1)`` visited neurons being the fan-in of the output. The output
        bias becomes zero."""
        bound = 1 / math.sqrt(self.input_width)
        self.node_weights.uniform_(-bound, bound)
        if self.node_biases is not None:
            self.node_biases.uniform_(-bound, bound)
        bound = 1 / math.sqrt(self.parallel_size * (self.depth + 1))
        self.node_outputs.uniform_(-bound, bound)
        if self.output_bias is not None:
            self.output_bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        straight_through = self.routing_gradient == STRAIGHT_THROUGH
        noise = alternates = None
        if self.training:
            trees, levels = self.parallel_size, self.depth + 1
            if self.noise:
                noise = decision_noise(x, trees, levels, noise=self.noise, slope=self.slope)
            if straight_through:
                alternates = drawn_alternates(x, trees, levels, self.depth, self.alternates)
        node_weights, node_biases, node_outputs, output_bias = tree_weights(self, _WEIGHTS)
        output = functional.run_tree(
            self.min_slope,
            self.row_sparse_grad,
            x,
            node_weights,
            node_biases,
            node_outputs,
            None,  # no leaf networks
            None,
            None,
            None,
            noise,
            None,
            alternates,
            self.parallel_size,
            False,
            self.activation,
            "identity",
            straight_through,
            self.slope,
        )[0]
        if output_bias is not None:
            output = output + output_bias.to(output.dtype)  # autocast lowers the trees' dtype alone
        return output

    def published_state_dict(self) -> dict[str, Tensor]:
        """The state dict of UltraFastBERT's training layer for this layer.

        Raises:
            ValueError: the layer has an output bias, which has no published form.
        """
        if self.output_bias is not None:
            reject("UltraFFF.published_state_dict", "output_bias", "False", True)
        return to_published(self.state_dict(), ULTRA_FAST_BERT)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        state = to_own(state_dict, prefix, ULTRA_FAST_BERT)
        nodes = ("nodes (parallel_size * (2**(depth + 1) - 1))", self.parallel_size * self.n_nodes)
        expected = {
            "node_weights": (nodes, ("input_width", self.input_width)),
            "node_outputs": (nodes, ("output_width", self.output_width)),
        }
        error_msgs += misfits("UltraFFF", state, prefix, expected)
        super()._load_from_state_dict(
            state, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        shown = (
            f"{self.input_width}, {self.output_width}, {self.depth}, "
            f"parallel_size={self.parallel_size}, activation={self.activation!r}"
        )
        if self.node_biases is None:
            shown += ", bias=False"
        if self.output_bias is not None:
            shown += ", output_bias=True"
        for name, default in _SHOWN_UNLESS_DEFAULT:
            value = getattr(self, name)
            if value != default:
                shown += f", {name}={value!r}"
        return shown
