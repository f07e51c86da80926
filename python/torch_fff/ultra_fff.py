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
from ._shared_base import check_base, fold_base, move_base
from .reference import add_level_base

_WEIGHTS = ("node_weights", "node_biases", "node_outputs", "output_bias")
_LEVEL_BASES = {
    "node_weights": "base_weights",
    "node_biases": "base_biases",
    "node_outputs": "base_outputs",
}
_SHOWN_UNLESS_DEFAULT = (
    ("routing_gradient", "none"),
    ("slope", 1.0),
    ("noise", 0.0),
    ("alternates", None),
    ("min_slope", 0.0),
    ("row_sparse_grad", False),
    ("shared_level_base", False),
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

    **Shared level base.** A node far from the root sees few tokens and learns slowly from nothing.
    With ``shared_level_base=True`` its weights are those of a base that all nodes of its level of
    its tree share, and that learns from every token, plus its own differences: base_weights[level]
    + node_weights[i], and so on. The differences start at zero; they learn best at a smaller rate
    than the base (``tree_lr_scale`` of :func:`torch_fff.recipes.parameter_groups`). Forwards then
    add up the weights of all nodes first; after training :meth:`fold` puts the base into the nodes,
    and the layer is an ordinary one, as fast as any.

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
        shared_level_base: whether node_weights, node_biases and node_outputs are differences from a
            base. Not with ``row_sparse_grad``: the base's gradient is a sum over all nodes.
        device, dtype: of the parameters.

    Parameters: node_weights [K * n, in], node_biases [K * n] (None without ``bias``), node_outputs
    [K * n, out], output_bias [out] (None unless asked for); base_weights [K, depth + 1, in],
    base_biases [K, depth + 1] (None without ``bias``), base_outputs [K, depth + 1, out] with a
    shared base. Trees lie one after the other, nodes in heap order.

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
    base_weights: Tensor | None
    base_biases: Tensor | None
    base_outputs: Tensor | None

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
        shared_level_base: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("UltraFFF", "input_width", input_width)
        check_count("UltraFFF", "output_width", output_width)
        check_count("UltraFFF", "depth", depth, minimum=0)
        check_count("UltraFFF", "parallel_size", parallel_size)
        check_routing("UltraFFF", routing_gradient, slope, noise, alternates, min_slope)
        if shared_level_base and row_sparse_grad:
            reject("UltraFFF", "row_sparse_grad", "False with shared_level_base", row_sparse_grad)

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
        self.shared_level_base = shared_level_base

        def parameter(name: str, *shape: int, present: bool = True) -> None:
            value = torch.empty(shape, device=device, dtype=dtype) if present else None
            self.register_parameter(name, None if value is None else nn.Parameter(value))

        nodes, levels, base = parallel_size * self.n_nodes, depth + 1, shared_level_base
        parameter("node_weights", nodes, input_width)
        parameter("node_biases", nodes, present=bias)
        parameter("node_outputs", nodes, output_width)
        parameter("output_bias", output_width, present=output_bias)
        parameter("base_weights", parallel_size, levels, input_width, present=base)
        parameter("base_biases", parallel_size, levels, present=base and bias)
        parameter("base_outputs", parallel_size, levels, output_width, present=base)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew, as published: uniform in +-1 / sqrt(fan-in), a token's
        ``parallel_size * (depth + 1)`` visited neurons being the fan-in of the output. The output
        bias becomes zero. A shared level base is drawn in the nodes' place, which become zero."""
        path = self.parallel_size * (self.depth + 1)
        for fan_in, weights in (
            (self.input_width, (self.node_weights, self.node_biases)),
            (path, (self.node_outputs,)),
            (self.input_width, (self.base_weights, self.base_biases)),
            (path, (self.base_outputs,)),
        ):
            for weight in weights:
                if weight is not None:
                    weight.uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        if self.shared_level_base:
            for weight in (self.node_weights, self.node_biases, self.node_outputs):
                if weight is not None:
                    weight.zero_()
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
        node_weights, node_biases, node_outputs, output_bias = self._tree_weights()
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

    def _tree_weights(self) -> list[Any]:
        """Those that the nodes compute with, and the output bias."""
        weights = tree_weights(self, _WEIGHTS)
        if self.shared_level_base:
            for index, base in enumerate(_LEVEL_BASES.values()):
                if weights[index] is not None:
                    weights[index] = add_level_base(getattr(self, base), weights[index])
        return weights

    def fold(self) -> UltraFFF:
        """Add the shared level base into the nodes, in place, and drop its parameters.

        The function stays the same to the bit; the layer is then that of
        ``shared_level_base=False``, in speed, state dict and every other way. Without a base
        nothing happens. In a Hugging Face model use :func:`torch_fff.recipes.fold`, which also
        updates its config. An optimizer made before keeps the base's parameters, to no effect.

        Returns:
            The layer itself.

        Raises:
            ValueError: a weight to be added is parametrised or pruned (``torch.nn.utils``).
        """
        if self.shared_level_base:
            fold_base("UltraFFF.fold", self, _LEVEL_BASES, self._tree_weights()[:3])
            self.shared_level_base = False
        return self

    def _move_base(self, owner: str) -> None:
        """The same function with a base of zeros."""
        if self.shared_level_base:
            move_base(owner, self, _LEVEL_BASES, self._tree_weights()[:3])

    def published_state_dict(self) -> dict[str, Tensor]:
        """The state dict of UltraFastBERT's training layer for this layer.

        Nodes come with a shared base added, as after :meth:`fold`.

        Raises:
            ValueError: the layer has an output bias, which has no published form.
        """
        if self.output_bias is not None:
            reject("UltraFFF.published_state_dict", "output_bias", "False", True)
        own = self.state_dict()
        for name, weight in zip(_LEVEL_BASES, self._tree_weights()[:3], strict=True):
            if weight is not None:
                own[name] = weight.detach()
        return to_published(own, ULTRA_FAST_BERT)

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
        error_msgs += check_base(
            "UltraFFF", "shared_level_base", self.shared_level_base, _LEVEL_BASES, state, prefix
        )
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
