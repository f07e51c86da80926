"""The FFF layer: a tree of decisions over leaf networks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from ._activation import activation_name
from ._arguments import check_choice, check_count, check_number, reject
from ._auxiliary import attach_loss
from ._checkpoint import FAST_FEEDFORWARD, misfits, to_own, to_published
from ._inspected import Inspected
from ._routing import (
    STRAIGHT_THROUGH,
    check_routing,
    decision_noise,
    drawn_alternates,
    score_dtype,
    tree_weights,
)
from ._shared_base import check_base, fold_base
from ._usage import count_mixture, count_path, exporting, in_backward
from .losses import leaf_balance_loss, node_balance_loss, node_entropies
from .reference import ACTIVATIONS, add_leaf_base

_LEAF_WEIGHTS = ("w1", "b1", "w2", "b2")
_LEAF_BASES = {name: f"base_{name}" for name in _LEAF_WEIGHTS}
_TREE_WEIGHTS = ("node_weights", "node_biases", "node_outputs", *_LEAF_WEIGHTS)
_SHOWN_UNLESS_DEFAULT = (
    ("dropout", 0.0),
    ("train_hardened", False),
    ("region_leak", 0.0),
    ("usage_mode", "none"),
    ("parallel_size", 1),
    ("routing_gradient", STRAIGHT_THROUGH),
    ("slope", 1.0),
    ("noise", 0.0),
    ("alternates", None),
    ("min_slope", 0.0),
    ("row_sparse_grad", False),
    ("prune", 0.0),
    ("hardening", 0.0),
    ("balance", 0.0),
    ("master_leaf_width", 0),
    ("shared_leaf_base", False),
)


class FFF(Inspected, nn.Module):
    r"""Fast feedforward layer (arXiv 2308.14711), a drop-in for ``fastfeedforward.FFF``.

    A binary tree of ``n_nodes`` = 2^depth - 1 decisions c = sigmoid(<x, w> + b) stands over
    ``n_leaves`` = 2^depth leaf networks leaf(x) = act(x w1^T + b1) w2 + b2 of ``leaf_width``
    neurons.

    - Soft, in training: out(node) = c out(right child) + (1 - c) out(left child), a mixture of all
      leaves.
    - Hard, in inference: right iff <x, w> + b >= 0 (NaN: left); only the leaf that is reached is
      computed, ``depth`` decisions and ``leaf_width`` neurons a token.

    Training forwards are soft unless ``train_hardened`` or ``use_hard_decisions``; evaluation
    forwards are hard unless ``use_hard_decisions=False``. Leaf output biases count in both.

    **Hard training.** With ``routing_gradient="straight_through"`` each decision on a token's path
    has the gradient of sigmoid(slope * s), s its score, through what the two branches below it
    contribute; with "none", as published, decisions learn nothing from the output. The decision is
    [slope * s + noise * logistic >= 0], with noise only in training. ``slope`` and ``noise`` play
    no role in soft forwards.

    The branches not taken cost about depth / 2 times the path. Two settings evaluate fewer:
    ``alternates=n`` draws, in every training forward, n of a token's decisions in each tree without
    replacement and scales their gradient by depth / n: noisier, with the right mean. ``min_slope``
    gives no gradient to decisions with 4 * sigmoid'(slope * s) <= min_slope: nothing is drawn, but
    what far decisions would have learned is missing.

    **Wide trees.** A step visits few rows of a tree with many nodes, and a gradient that is written
    for all of them costs more than the pass itself. With ``row_sparse_grad=True`` the gradients of
    node_weights, node_biases, node_outputs, w1, b1, w2 and b2 in hard forwards are sparse tensors
    that list each visited node or leaf once, in ascending order, like those of
    ``nn.Embedding(sparse=True)`` (coalesced; ``.grad`` loses that mark). torch.optim's SGD,
    SparseAdam and Adagrad take them, without weight decay. They are for parameters themselves, on
    the CPU, in eager mode: not for torch.func, for compiled training, nor for weights that autocast
    casts. What else uses a parameter, such as the hardening loss, makes its gradient dense.

    **Shared leaf base.** A leaf sees few tokens and learns slowly from nothing. With
    ``shared_leaf_base=True`` its weights are those of a base that all leaves of its tree share, and
    that learns from every token, plus its own differences: base_w1 + w1, and so on. The differences
    start at zero. Forwards then add up the weights of all leaves first; after training
    :meth:`fold` puts the base into the leaves, and the layer is an ordinary one, as fast as any.

    **Pruning** makes soft training cheaper the harder its decisions are: with ``prune=eps`` a
    token skips the leaves whose weight in its mixture is below eps, in the output and in the
    gradients; the heaviest leaf of each tree is never skipped. What is missing from the output is
    less than eps times the sum of the skipped leaves' |leaf(x)|. Nodes, losses and usage see the
    whole mixture. On the CPU skipped leaves cost nothing; on a GPU, and with ``dropout``, all are
    computed, with the same result. It plays no role in hard forwards.

    **Hardening** teaches a soft tree decisions that can be rounded. Its loss is, always, the sum
    over nodes of the mean over tokens of the entropy of c, in nats. Use one of:

    - ``y, entropies = layer(x, return_entropies=True)``; add ``h * entropies.sum()`` to the loss;
    - ``torch_fff.hardening_loss(model)``: all layers of a model (soft training forwards only);
    - ``FFF(hardening=h)``: the layer's backward adds the gradient of ``h`` times the loss by
      itself, and the loss, without ``h``, stays in ``layer.entropy`` (detached) for logging.

    ``balance=b`` works like ``hardening=h``, with value ``layer.balance_loss``: in soft forwards
    the balance of the leaves (:func:`torch_fff.losses.leaf_balance_loss`), in hard ones that of the
    decisions (:func:`torch_fff.losses.node_balance_loss`).

    Losses that a layer adds by itself are not scaled by what the training loop does to its own
    loss: with n steps of gradient accumulation of ``loss / n``, set ``hardening=h / n``. They are
    right under checkpointing, DDP (which averages gradients) and ``torch.compile``; under float16,
    whose loss scaling would not reach them, they raise a RuntimeError.

    Training forwards leave node logits, losses and usage on the layer, which ``torch.compile``
    accepts in a checkpointed region only with
    ``torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True``.

    **Usage** counts, with ``usage_mode``, how often training reached each node and leaf, in the
    float32 buffers ``node_usage`` [K * n] and ``leaf_usage`` [K * n_leaves]: "soft" adds up the
    weights with which they were reached, "hard" counts the hard path, also within soft training.
    (The PyPI package adds a node's local branch probability to its child's ``node_usage``, whether
    or not the node was reached.)

    ``slope``, ``noise``, ``alternates``, ``min_slope``, ``prune``, ``hardening`` and ``balance``
    are plain attributes that a schedule may change every step. Under ``torch.compile`` each new
    ``slope``, ``alternates``, ``min_slope`` or ``prune`` is a compilation of its own, so change
    them now and then; the other three are free.

    Args:
        input_width: last dimension of the input, ``in``.
        leaf_width: neurons per leaf, ``l``.
        output_width: last dimension of the output, ``out``.
        depth: levels of decisions, >= 0.
        activation: of the leaves: nn.ReLU, nn.GELU, nn.SiLU or nn.Identity, or the operators' name
            of one.
        dropout: probability of dropping a leaf's hidden activation in training.
        train_hardened: whether training forwards are hard.
        region_leak: probability of flipping a decision (c becomes 1 - c) in training, per token and
            node. Hard training forwards need <= 0.5; they draw once per token and level.
        usage_mode: "none", "soft" or "hard".
        parallel_size: number of trees K, whose outputs add up.
        node_output: give each node an output row: a node that is reached adds node_activation(s)
            times it.
        node_activation: of the node outputs; ``activation`` by default.
        routing_gradient: "straight_through" or "none", for hard training.
        slope: of the straight-through sigmoid.
        noise: scale of the logistic noise on decisions in hard training.
        alternates: number of branches not taken that are evaluated per token and tree in hard
            training; None for all.
        min_slope: share of the sigmoid's greatest slope up to which a decision gets no gradient.
        row_sparse_grad: in hard forwards, give the parameters of the trees gradients that are
            sparse tensors of the nodes and leaves that were visited.
        prune: threshold eps in [0, 1] on the leaves' weights in soft forwards; 0 computes all
            leaves.
        hardening: weight h.
        balance: weight b.
        master_leaf_width: width m of a leaf that every token uses (arXiv 2405.16836), 0 for none:
            y = sigmoid(k) * tree(x) + (1 - sigmoid(k)) * master(x), k learned.
        shared_leaf_base: whether w1, b1, w2 and b2 are differences from a base. Not with
            ``row_sparse_grad``: the base's gradient is a sum over all leaves.
        device, dtype: of the parameters.

    Parameters (a neuron's weights are a row):
        node_weights [K * n, in], node_biases [K * n], w1 [K * n_leaves, l, in], b1 [K * n_leaves,
        l], w2 [K * n_leaves, l, out], b2 [K * n_leaves, out]; node_outputs [K * n, out] with
        ``node_output``; master_w1 [m, in], master_b1 [m], master_w2 [m, out], master_b2 [out],
        master_logit [] with a master leaf; base_w1 [K, l, in], base_b1 [K, l], base_w2 [K, l, out],
        base_b2 [K, out] with a shared base. Trees lie one after the other, nodes in heap order:
        node i has children 2i + 1 and 2i + 2.

    Shape: [..., in] -> [..., out], any leading dimensions, zero tokens included.

    Dtypes: float32, float64, bfloat16 or float16, one for input and parameters, or autocast. Scores
    are accumulated in float32 (float64 for float64).

    ``load_state_dict`` takes checkpoints of ``fastfeedforward`` and of 2405.16836 as well as its
    own; :meth:`published_state_dict` gives them back.

    Raises:
        ValueError: an argument of the constructor is wrong.
        ValueError, RuntimeError: in a forward, soft or hard: the input has another width, dtype or
            device than the parameters.
    """

    node_weights: Tensor
    node_biases: Tensor
    node_outputs: Tensor | None
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    master_w1: Tensor
    master_b1: Tensor
    master_w2: Tensor
    master_b2: Tensor
    master_logit: Tensor
    base_w1: Tensor | None
    base_b1: Tensor | None
    base_w2: Tensor | None
    base_b2: Tensor | None
    node_usage: Tensor
    leaf_usage: Tensor

    def __init__(
        self,
        input_width: int,
        leaf_width: int,
        output_width: int,
        depth: int,
        activation: nn.Module | str = nn.ReLU(),  # noqa: B008
        dropout: float = 0.0,
        train_hardened: bool = False,
        region_leak: float = 0.0,
        usage_mode: str = "none",
        *,
        parallel_size: int = 1,
        node_output: bool = False,
        node_activation: nn.Module | str | None = None,
        routing_gradient: str = STRAIGHT_THROUGH,
        slope: float = 1.0,
        noise: float = 0.0,
        alternates: int | None = None,
        min_slope: float = 0.0,
        row_sparse_grad: bool = False,
        prune: float = 0.0,
        hardening: float = 0.0,
        balance: float = 0.0,
        master_leaf_width: int = 0,
        shared_leaf_base: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for argument, count, minimum in (
            ("input_width", input_width, 1),
            ("leaf_width", leaf_width, 1),
            ("output_width", output_width, 1),
            ("depth", depth, 0),
            ("parallel_size", parallel_size, 1),
            ("master_leaf_width", master_leaf_width, 0),
        ):
            check_count("FFF", argument, count, minimum)
        for argument, number, high in (
            ("dropout", dropout, 1.0),
            ("region_leak", region_leak, 0.5 if train_hardened else 1.0),
            ("prune", prune, 1.0),
            ("hardening", hardening, math.inf),
            ("balance", balance, math.inf),
        ):
            check_number("FFF", argument, number, 0.0, high)
        check_choice("FFF", "usage_mode", usage_mode, ("none", "soft", "hard"))
        check_routing("FFF", routing_gradient, slope, noise, alternates, min_slope)
        if shared_leaf_base and row_sparse_grad:
            reject("FFF", "row_sparse_grad", "False with shared_leaf_base", row_sparse_grad)

        self.input_width = input_width
        self.leaf_width = leaf_width
        self.output_width = output_width
        self.depth = depth
        self.parallel_size = parallel_size
        self.master_leaf_width = master_leaf_width
        self.shared_leaf_base = shared_leaf_base
        self.n_leaves = 2**depth
        self.n_nodes = 2**depth - 1
        self.activation = activation_name("FFF", "activation", activation)
        self.node_activation = (
            self.activation
            if node_activation is None
            else activation_name("FFF", "node_activation", node_activation)
        )
        self.dropout = float(dropout)
        self.train_hardened = train_hardened
        self.region_leak = float(region_leak)
        self.usage_mode = usage_mode
        self.routing_gradient = routing_gradient
        self.slope = float(slope)
        self.noise = float(noise)
        self.alternates = alternates
        self.min_slope = float(min_slope)
        self.row_sparse_grad = row_sparse_grad
        self.prune = float(prune)
        self.hardening = float(hardening)
        self.balance = float(balance)
        self.entropy: Tensor | None = None
        self.balance_loss: Tensor | None = None
        self._node_logits: Tensor | None = None

        def parameter(name: str, *shape: int, present: bool = True) -> None:
            value = torch.empty(shape, device=device, dtype=dtype) if present else None
            self.register_parameter(name, None if value is None else nn.Parameter(value))

        nodes, leaves = parallel_size * self.n_nodes, parallel_size * self.n_leaves
        master = master_leaf_width > 0
        parameter("node_weights", nodes, input_width)
        parameter("node_biases", nodes)
        parameter("node_outputs", nodes, output_width, present=node_output)
        parameter("w1", leaves, leaf_width, input_width)
        parameter("b1", leaves, leaf_width)
        parameter("w2", leaves, leaf_width, output_width)
        parameter("b2", leaves, output_width)
        parameter("master_w1", master_leaf_width, input_width, present=master)
        parameter("master_b1", master_leaf_width, present=master)
        parameter("master_w2", master_leaf_width, output_width, present=master)
        parameter("master_b2", output_width, present=master)
        parameter("master_logit", present=master)
        base = shared_leaf_base
        parameter("base_w1", parallel_size, leaf_width, input_width, present=base)
        parameter("base_b1", parallel_size, leaf_width, present=base)
        parameter("base_w2", parallel_size, leaf_width, output_width, present=base)
        parameter("base_b2", parallel_size, output_width, present=base)
        if usage_mode != "none":
            self.register_buffer("node_usage", torch.zeros(nodes, device=device))
            self.register_buffer("leaf_usage", torch.zeros(leaves, device=device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all weights anew, uniform in +-1 / sqrt(fan-in) as published, and forget the usage.

        What a tree adds to the output counts as fan-in: ``leaf_width`` hidden neurons per tree, and
        with node outputs ``depth`` nodes more for those. A shared leaf base is drawn in the leaves'
        place, which become zero.
        """
        hidden = self.parallel_size * self.leaf_width
        path = self.parallel_size * (self.depth + self.leaf_width)
        for fan_in, weights in (
            (self.input_width, (self.node_weights, self.node_biases, self.w1, self.b1)),
            (self.input_width, (self.base_w1, self.base_b1, self.master_w1, self.master_b1)),
            (hidden, (self.w2, self.b2, self.base_w2, self.base_b2)),
            (path, (self.node_outputs,)),
            (self.master_leaf_width, (self.master_w2, self.master_b2)),
        ):
            for weight in weights:
                if weight is not None:
                    weight.uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        if self.master_leaf_width:
            self.master_logit.fill_(0.5)
        if self.shared_leaf_base:
            for name in _LEAF_WEIGHTS:
                getattr(self, name).zero_()
        if self.usage_mode != "none":
            self.node_usage.zero_()
            self.leaf_usage.zero_()

    def forward(
        self,
        x: Tensor,
        return_entropies: bool = False,
        use_hard_decisions: bool | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Apply the layer to ``x`` [..., in].

        Args:
            x: tokens.
            return_entropies: also return the mean over tokens of each node's decision entropy, [K *
                n]. A hard forward computes the logits of all nodes for it.
            use_hard_decisions: soft or hard; None for the mode's default (see the class).

        Returns:
            y [..., out], or (y, entropies).
        """
        training = self.training
        if training:
            hard = use_hard_decisions or self.train_hardened
        else:
            hard = use_hard_decisions is None or use_hard_decisions
        output, node_logits, balance = self._hard(x) if hard else self._soft(x)
        if self.master_leaf_width:
            output = self._mix_with_master_leaf(x, output)
        if training:
            if not exporting() and not in_backward():
                self._node_logits = node_logits
            output = self._attach_losses(x, output, node_logits, balance)
        if return_entropies:
            return output, self._entropies(x, node_logits)
        return output

    def _hard(self, x: Tensor) -> tuple[Tensor, None, Tensor | None]:
        """output, None for node logits, balance loss."""
        straight_through = self.routing_gradient == STRAIGHT_THROUGH
        noise = leaf_scale = alternates = None
        if self.training:
            if self.noise or self.region_leak:
                noise = self._noise(x)
            if self.dropout:
                leaf_scale = self._dropout_mask(x)
            if straight_through:
                trees, levels = self.parallel_size, self.depth
                alternates = drawn_alternates(x, trees, levels, levels, self.alternates)
        output, scores, leaf = functional.tree(
            x,
            *self._tree_weights(),
            noise=noise,
            leaf_scale=leaf_scale,
            alternates=alternates,
            trees=self.parallel_size,
            node_activation=self.node_activation,
            leaf_activation=self.activation,
            straight_through=straight_through,
            slope=self.slope,
            min_slope=self.min_slope,
            row_sparse_grad=self.row_sparse_grad,
        )
        if not self.training:
            return output, None, None
        if self.usage_mode != "none":
            count_path(self.node_usage, self.leaf_usage, leaf, self.depth)
        return output, None, self._hard_balance(x, scores, leaf) if self.balance else None

    def _hard_balance(self, x: Tensor, scores: Tensor, leaf: Tensor) -> Tensor:
        return node_balance_loss(scores, leaf, self.slope)

    def _soft(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """output, node logits, balance loss."""
        training = self.training
        leak = None
        if training and self.region_leak:
            shape = (*x.shape[:-1], self.parallel_size, self.n_nodes)
            leak = torch.rand(shape, device=x.device) < self.region_leak
        output, node_logits, mixture = functional.soft_tree(
            x,
            *self._tree_weights(),
            leak=leak,
            dropout=self.dropout if training else 0.0,
            prune=self.prune,
            trees=self.parallel_size,
            node_activation=self.node_activation,
            leaf_activation=self.activation,
        )
        if not training:
            return output, node_logits, None
        if self.usage_mode == "soft":
            count_mixture(self.node_usage, self.leaf_usage, mixture)
        elif self.usage_mode == "hard":
            nodes = (self.node_weights, self.node_biases)
            leaf = functional.descend(x, *nodes, trees=self.parallel_size)[1]
            count_path(self.node_usage, self.leaf_usage, leaf, self.depth)
        balance = leaf_balance_loss(mixture) if self.balance else None
        return output, node_logits, balance

    def _tree_weights(self) -> list[Any]:
        weights = tree_weights(self, _TREE_WEIGHTS)
        if self.shared_leaf_base:
            weights[-len(_LEAF_WEIGHTS) :] = self._leaf_weights()
        return weights

    def _leaf_weights(self) -> list[Tensor]:
        """Those that the leaves compute with."""
        own = [getattr(self, name) for name in _LEAF_WEIGHTS]
        if not self.shared_leaf_base:
            return own
        bases = [getattr(self, name) for name in _LEAF_BASES.values()]
        return [add_leaf_base(base, weight) for base, weight in zip(bases, own, strict=True)]

    def fold(self) -> FFF:
        """Add the shared leaf base into the leaves, in place, and drop its parameters.

        The function stays the same to the bit; the layer is then that of
        ``shared_leaf_base=False``, in speed, state dict and every other way. Without a base nothing
        happens. In a Hugging Face model use :func:`torch_fff.recipes.fold`, which also updates its
        config. An optimizer made before keeps the base's parameters, to no effect.

        Returns:
            The layer itself.

        Raises:
            ValueError: a weight to be added is parametrised or pruned (``torch.nn.utils``).
        """
        if self.shared_leaf_base:
            fold_base("FFF.fold", self, _LEAF_BASES, self._leaf_weights())
            self.shared_leaf_base = False
        return self

    def _noise(self, x: Tensor) -> Tensor:
        if self.region_leak > 0.5:
            reject("FFF", "region_leak", "a number in [0, 0.5] in hard training", self.region_leak)
        return decision_noise(
            x,
            self.parallel_size,
            self.depth,
            noise=self.noise,
            slope=self.slope,
            leak=self.region_leak,
        )

    def _dropout_mask(self, x: Tensor) -> Tensor:
        """The operator's ``leaf_scale``, [..., K, l]."""
        shape = (*x.shape[:-1], self.parallel_size, self.leaf_width)
        return F.dropout(torch.ones(shape, dtype=score_dtype(x), device=x.device), self.dropout)

    def _entropies(self, x: Tensor, node_logits: Tensor | None) -> Tensor:
        """Mean entropies of all nodes, [K * n]; a hard forward has no ``node_logits`` of all."""
        if node_logits is None:
            node_logits = F.linear(x, self.node_weights, self.node_biases)
            node_logits = node_logits.view(*x.shape[:-1], self.parallel_size, self.n_nodes)
        return node_entropies(node_logits)

    def _mix_with_master_leaf(self, x: Tensor, output: Tensor) -> Tensor:
        hidden = ACTIVATIONS[self.activation](F.linear(x, self.master_w1, self.master_b1))
        master = F.linear(hidden, self.master_w2.T, self.master_b2)
        share = torch.sigmoid(self.master_logit)
        # One product with the share, so that its gradient is no difference of two rounded sums.
        mixed: Tensor = master + share * (output - master)
        return mixed

    def _attach_losses(
        self, x: Tensor, output: Tensor, node_logits: Tensor | None, balance: Tensor | None
    ) -> Tensor:
        """``output``, whose backward adds the gradients of the layer's own losses."""
        losses = []
        record = not exporting()
        if self.hardening:
            entropy = self._entropies(x, node_logits).sum()
            losses.append(self.hardening * entropy)
            if record:
                self.entropy = entropy.detach()
        if balance is not None:
            losses.append(self.balance * balance)
            if record:
                self.balance_loss = balance.detach()
        for loss in losses:
            output = attach_loss("FFF", output, loss)
        return output

    def get_node_param_group(self) -> dict[str, Any]:
        """Optimizer group of what belongs to the nodes, [K * n, ...] each.

        "params"; and, unless ``usage_mode`` is "none", "usage", the counts [K * n] that
        :class:`torch_fff.optim.LocalSGD` and ``LocalAdam`` read. The master leaf and a shared leaf
        base are in neither group: every token uses them.
        """
        names = ("node_weights", "node_biases", "node_outputs")
        return self._param_group(names, "node_usage")

    def get_leaf_param_group(self) -> dict[str, Any]:
        """Optimizer group of what belongs to the leaves, [K * n_leaves, ...] each, as for nodes."""
        return self._param_group(_LEAF_WEIGHTS, "leaf_usage")

    def get_leaf_base_param_group(self) -> dict[str, Any]:
        """Optimizer group of the shared leaf base; its "params" are empty without one.

        There is no "usage": all tokens use it, so that it is updated in every step.
        """
        bases = [getattr(self, name) for name in _LEAF_BASES.values()]
        return {"params": [base for base in bases if base is not None]}

    def _param_group(self, names: tuple[str, ...], usage: str) -> dict[str, Any]:
        weights = [getattr(self, name) for name in names]
        group: dict[str, Any] = {"params": [weight for weight in weights if weight is not None]}
        if self.usage_mode != "none":
            group["usage"] = getattr(self, usage)
        return group

    def published_state_dict(self) -> dict[str, Tensor]:
        """This layer's state dict for ``fastfeedforward.FFF`` (with master leaf: 2405.16836).

        Leaves come with a shared base added, as after :meth:`fold`.

        Raises:
            ValueError: the layer has several trees or node outputs, which have no published form.
        """
        for argument, value, published in (
            ("parallel_size", self.parallel_size, 1),
            ("node_output", self.node_outputs is not None, False),
        ):
            if value != published:
                reject("FFF.published_state_dict", argument, repr(published), value)
        own = self.state_dict()
        leaves = (weight.detach() for weight in self._leaf_weights())
        own.update(zip(_LEAF_WEIGHTS, leaves, strict=True))
        state = to_published(own, FAST_FEEDFORWARD)
        return {"depth": torch.tensor(self.depth), **state}

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
        state = to_own(state_dict, prefix, FAST_FEEDFORWARD)
        state.pop(prefix + "depth", None)  # the shapes tell
        state.pop(prefix + "f", None)  # 2405.16836: a counter
        if self.usage_mode == "none":
            state.pop(prefix + "node_usage", None)
            state.pop(prefix + "leaf_usage", None)
        master_w1 = state.get(prefix + "master_w1")
        if master_w1 is not None and not self.master_leaf_width:
            error_msgs.append(
                "FFF: master_leaf_width: expected no master leaf, the checkpoint has one: "
                f"construct the layer with master_leaf_width={len(master_w1)}"
            )
            for name in ("master_w1", "master_b1", "master_w2", "master_b2", "master_logit"):
                state.pop(prefix + name, None)
        error_msgs += check_base(
            "FFF", "shared_leaf_base", self.shared_leaf_base, _LEAF_BASES, state, prefix
        )
        leaves = ("leaves (parallel_size * 2**depth)", self.parallel_size * self.n_leaves)
        leaf_width = ("leaf_width", self.leaf_width)
        expected = {
            "w1": (leaves, leaf_width, ("input_width", self.input_width)),
            "w2": (leaves, leaf_width, ("output_width", self.output_width)),
        }
        error_msgs += misfits("FFF", state, prefix, expected)
        super()._load_from_state_dict(
            state, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def train(self, mode: bool = True) -> FFF:
        """Set the mode; the node logits of the last forward do not outlive a change."""
        self._node_logits = None
        super().train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # The logits hang on the graph of a forward, which can be neither copied nor pickled.
        return {**self.__dict__, "_node_logits": None}

    def extra_repr(self) -> str:
        shown = (
            f"{self.input_width}, {self.leaf_width}, {self.output_width}, {self.depth}, "
            f"activation={self.activation!r}"
        )
        for name, default in _SHOWN_UNLESS_DEFAULT:
            value = getattr(self, name)
            if value != default:
                shown += f", {name}={value!r}"
        if self.node_outputs is not None:
            shown += f", node_output=True, node_activation={self.node_activation!r}"
        return shown
