"""What trees do with tokens: use of nodes and leaves, how sure decisions are, soft against hard.

    print(layer.report(x))  # of one layer
    print(report(model, *inputs))  # of all layers of a model
    layer.plot_tree(x, labels)

A tree has *collapsed* when few of its leaves get nearly all tokens: a dense layer of their width
would do as well. It *fragments* when most decisions are close calls, so that tokens which are
alike part: no leaf learns more than its neighbours, and rounding decisions changes the output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional
from ._arguments import check_count, reject
from ._table import aligned
from .fff import FFF
from .reference import ACTIVATIONS
from .ultra_fff import UltraFFF

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LayerReport", "ModelReport", "layer_report", "plot_tree", "report", "soft_output"]

Layer = FFF | UltraFFF

_OVERFULL = 4.0  # times the even share
_COLLAPSED = 1 / 3  # of the greatest entropy of usage: a tree of that share of the depth would do
_UNEVEN = 3 / 4
_FRAGMENTED = 1 / 2  # of the decisions undecided
_TOO_FEW = 4  # tokens a leaf, below which nothing can be told
_CHUNK = 2**24  # elements of the largest tensor of a soft forward


@dataclass(frozen=True)
class LayerReport:
    """What one layer did with some tokens, with hard paths; prints as a small table.

    Of an :class:`UltraFFF` the nodes here are those that decide, and a leaf is a neuron of the last
    level, which decides nothing.

    layer: what it is, in words.
    tokens: number of tokens.
    leaf_usage: [K, leaves], share of the tokens that reach each leaf.
    decision_entropy: mean entropy, in nats (at most ln 2 = 0.69), of the decisions on the tokens'
        paths, taken as sigmoid(slope * s). 0 without decisions.
    undecided: share of those decisions with |slope * s| < 1: close calls, whose sigmoid lies
        between 0.27 and 0.73.
    argmax_disagreement: share of the tokens for which the soft output, all decisions being
        sigmoids of slope * s, has another largest element than the hard one; None if not asked for.
    output_difference: ||soft - hard|| / ||hard||, over all tokens; None likewise.
    """

    layer: str
    tokens: int
    leaf_usage: Tensor
    decision_entropy: float
    undecided: float
    argmax_disagreement: float | None
    output_difference: float | None

    @property
    def leaves(self) -> int:
        """Over all trees."""
        return self.leaf_usage.numel()

    @property
    def node_usage(self) -> Tensor:
        """[K, leaves - 1], share of the tokens that visit each node, in heap order."""
        return functional.node_reach(self.leaf_usage)

    @property
    def node_split(self) -> Tensor:
        """[K, leaves - 1], share of a node's tokens that it sends right; NaN where none come."""
        below = torch.cat((self.node_usage, self.leaf_usage), -1)  # one heap
        return below[..., 2::2] / self.node_usage

    @property
    def leaves_used(self) -> int:
        """Leaves that some token reaches, over all trees."""
        return self.leaves - int(self.dead_leaves.sum())

    @property
    def dead_leaves(self) -> Tensor:
        """[K, leaves] bool: no token comes."""
        return self.leaf_usage == 0

    @property
    def overfull_leaves(self) -> Tensor:
        """[K, leaves] bool: more than 4 times as many tokens as if all leaves got equally many."""
        return self.leaf_usage * self.leaf_usage.shape[-1] > _OVERFULL

    @property
    def usage_entropy(self) -> float:
        """Of a tree's leaf usage, in nats, at most ln(leaves); mean over the trees."""
        return float(torch.special.entr(self.leaf_usage).sum(-1).mean())

    @property
    def effective_leaves(self) -> float:
        """exp(usage entropy): as many equally full leaves would be as uncertain. Per tree."""
        return math.exp(self.usage_entropy)

    @property
    def verdict(self) -> str:
        """One line in words: whether the tree has collapsed, fragments, or neither."""
        per_tree = self.leaf_usage.shape[-1]
        effective = f"as if {self.effective_leaves:.1f} of {per_tree} leaves were in use"
        if self.tokens < _TOO_FEW * per_tree:
            return f"too few tokens to tell: {self.tokens:,} for {per_tree:,} leaves"
        evenness = self.usage_entropy / math.log(per_tree) if per_tree > 1 else 1.0
        if evenness < _COLLAPSED:
            return f"collapsed: {effective}"
        if self.undecided > _FRAGMENTED:
            return (
                f"fragments: {self.undecided:.0%} of the decisions are close calls, so that like "
                "tokens part"
            )
        return f"{'uneven' if evenness < _UNEVEN else 'healthy'}: {effective}"

    def __str__(self) -> str:
        per_tree = self.leaf_usage.shape[-1]
        dead, overfull = int(self.dead_leaves.sum()), int(self.overfull_leaves.sum())
        most = math.log(per_tree)
        rows = {
            "leaves used": f"{self.leaves_used:,} of {self.leaves:,}, {overfull:,} overfull, "
            f"{dead:,} dead",
            "effective leaves": f"{self.effective_leaves:.1f} of {per_tree:,} per tree; entropy of "
            f"usage {self.usage_entropy:.2f} of {most:.2f} nats",
            "fullest leaf": f"{self.leaf_usage.max().item():.1%} of the tokens",
            "decisions": f"{self.undecided:.1%} close calls; entropy {self.decision_entropy:.3f} "
            f"of {math.log(2):.3f} nats",
        }
        if self.output_difference is not None and self.argmax_disagreement is not None:
            rows["soft against hard"] = (
                f"{self.argmax_disagreement:.1%} of the tokens have another argmax; outputs differ "
                f"by {self.output_difference:.1%}"
            )
        table = aligned(list(rows.items()), 2)
        head = f"{self.layer}, {self.tokens:,} tokens"
        return "\n".join([head, *("  " + line for line in table), self.verdict])


@dataclass(frozen=True)
class ModelReport:
    """The reports of a model's layers by name, in the order they ran; prints a row for each."""

    layers: dict[str, LayerReport]

    def __str__(self) -> str:
        names = "tokens leaves used effective fullest overfull"
        header = ("layer", *names.split(), "close calls", "soft - hard")
        rows = [
            (
                name or "model",
                f"{one.tokens:,}",
                f"{one.leaves:,}",
                f"{one.leaves_used:,}",
                f"{one.effective_leaves:.1f}",
                f"{one.leaf_usage.max().item():.1%}",
                f"{int(one.overfull_leaves.sum()):,}",
                f"{one.undecided:.1%}",
                "" if one.output_difference is None else f"{one.output_difference:.1%}",
            )
            for name, one in self.layers.items()
        ]
        lines = aligned([header, *rows], 1)
        verdicts = ["", *(one.verdict.split(":")[0] for one in self.layers.values())]
        pairs = zip(lines, verdicts, strict=True)
        return "\n".join(f"{line}  {verdict}".rstrip() for line, verdict in pairs)


@torch.no_grad()
def layer_report(layer: Layer, x: Tensor, *, soft: bool = True) -> LayerReport:
    """What ``layer`` does with tokens ``x`` [..., in], as in eval mode.

    Args:
        x: tokens, at least one, on the layer's device; taken in the dtype of its weights.
        soft: whether to compare the soft output with the hard one, which computes all leaves.

    Raises:
        ValueError: ``x`` has another shape than [..., in], or no tokens.
    """
    tokens = _tokens("report", layer, x)
    trees, leaves = layer.parallel_size, 2**layer.depth
    scores, leaf = _paths(layer, tokens)
    usage = torch.stack([torch.bincount(of_tree, minlength=leaves) for of_tree in leaf.T])
    decisions = layer.slope * scores
    disagreement = difference = None
    if soft:
        training = layer.training
        hard = layer.eval()(tokens)
        layer.train(training)
        mixed = soft_output(layer, tokens)
        disagreement = (mixed.argmax(-1) != hard.argmax(-1)).double().mean().item()
        size = hard.double().norm().clamp(min=torch.finfo(torch.float64).tiny)
        difference = ((mixed - hard).double().norm() / size).item()
    kind = f"{type(layer).__name__} {layer.input_width} -> {layer.output_width}"
    shape = f"{trees} tree{'s' if trees > 1 else ''} of depth {layer.depth}"
    return LayerReport(
        layer=f"{kind}, {shape}",
        tokens=len(tokens),
        leaf_usage=usage.double() / len(tokens),
        decision_entropy=_mean(functional.bernoulli_entropy(decisions)),
        undecided=_mean(decisions.abs() < 1),
        argmax_disagreement=disagreement,
        output_difference=difference,
    )


def report(model: nn.Module, *inputs: Any, soft: bool = True, **keywords: Any) -> ModelReport:
    """Run ``model(*inputs, **keywords)`` once and report on each :class:`FFF` and
    :class:`UltraFFF` layer in it.

    The model runs in eval mode, without gradients, and is left in its mode. A layer that runs
    several times counts with all its tokens. Layers in compiled parts are passed over.

    Args:
        soft: as for :func:`layer_report`.

    Raises:
        ValueError: the model has no such layer, or none ran.
    """
    seen: dict[str, list[Tensor]] = {}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, FFF | UltraFFF)}

    def note(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], keywords: Any) -> None:
            x = arguments[0] if arguments else keywords["x"]
            seen.setdefault(name, []).append(x.detach().flatten(0, -2))

        return hook

    handles = [
        layer.register_forward_pre_hook(note(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            model.eval()(*inputs, **keywords)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    if not seen:
        reject("report", "model", "one that runs FFF or UltraFFF layers", type(model).__name__)
    return ModelReport(
        {name: layer_report(layers[name], torch.cat(x), soft=soft) for name, x in seen.items()}
    )


@torch.no_grad()
def soft_output(layer: Layer, x: Tensor) -> Tensor:
    """Output [..., out] for ``x`` [..., in] when every decision is its sigmoid, sigmoid(slope * s).

    That is what straight-through training takes the gradient of, and at slope 1 the soft forward of
    an :class:`FFF`. All nodes and leaves are computed, for some tokens at a time.
    """
    tokens = x.reshape(-1, x.shape[-1])
    widest = layer.parallel_size * 2 ** (layer.depth + 1)
    if isinstance(layer, FFF):
        widest = max(widest, layer.parallel_size * layer.n_leaves * layer.leaf_width)
    parts = [_soft_output(layer, part) for part in tokens.split(max(1, _CHUNK // widest))]
    return torch.cat(parts).view(*x.shape[:-1], layer.output_width)


def _soft_output(layer: Layer, x: Tensor) -> Tensor:
    trees = layer.parallel_size
    weight, bias, node_outputs, *leaves = layer._tree_weights()
    scores = F.linear(x, weight, bias).view(len(x), trees, layer.n_nodes)
    mixture = functional.leaf_mixture(layer.slope * scores)
    output = x.new_zeros(len(x), layer.output_width)
    if isinstance(layer, FFF):
        # These nodes decide and do nothing else, so that a slope is a scale of their weights.
        output = functional.soft_tree(
            x,
            layer.slope * weight,
            layer.slope * bias,
            None,
            *leaves,
            trees=trees,
            leaf_activation=layer.activation,
        ).output
    if node_outputs is not None:
        name = layer.node_activation if isinstance(layer, FFF) else layer.activation
        value = ACTIVATIONS[name](scores) * functional.node_reach(mixture)
        output = output + value.flatten(1) @ node_outputs
    if isinstance(layer, FFF):
        return layer._mix_with_master_leaf(x, output) if layer.master_leaf_width else output
    return output if layer.output_bias is None else output + layer.output_bias


def plot_tree(
    layer: Layer,
    x: Tensor,
    y: Tensor | None = None,
    *,
    tree: int = 0,
    max_depth: int = 7,
    classes: list[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw what a tree of ``layer`` does with tokens ``x`` [..., in]; needs matplotlib.

    A branch is as wide as its share of the tokens, dotted without any. A node tells by its colour
    (and in trees of depth up to 4 in figures) which share of its tokens it sends right. Bars below
    are the leaves' shares of all tokens, the line across them being the even share.

    Args:
        y: [...] integers, class of each token: a leaf is coloured by the most frequent of its own.
        tree: which, of the layer's ``parallel_size``.
        max_depth: what lies deeper is drawn as one leaf.
        classes: names for the classes 0, 1, ...
        ax: where to draw; a new figure by default.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: an argument is wrong.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("plot_tree: expected the package matplotlib, got none") from error
    from ._tree_plot import draw

    tokens = _tokens("plot_tree", layer, x)
    check_count("plot_tree", "max_depth", max_depth)
    check_count("plot_tree", "tree", tree, minimum=0)
    if tree >= layer.parallel_size:
        reject("plot_tree", "tree", f"an index below {layer.parallel_size}", tree)
    if y is not None and (y.shape != x.shape[:-1] or y.is_floating_point() or (y < 0).any()):
        expected = f"integers >= 0 {list(x.shape[:-1])}"
        reject("plot_tree", "y", expected, f"{y.dtype} {list(y.shape)}")
    if y is not None and classes is not None and len(classes) <= int(y.max()):
        reject("plot_tree", "classes", f"names of {int(y.max()) + 1} classes", classes)
    depth = min(layer.depth, max_depth)
    leaf = _paths(layer, tokens)[1][:, tree] >> (layer.depth - depth)
    found = layer_report(layer, tokens, soft=False)
    title = found.layer
    if layer.parallel_size > 1:
        title += f", tree {tree}"
    if depth < layer.depth:
        title += f", drawn to depth {depth}"
    title += f"\n{found.verdict}"
    return draw(depth, leaf.cpu(), None if y is None else y.flatten().cpu(), classes, title, ax)


def _paths(layer: Layer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of the decisions [tokens, K, depth], leaf [tokens, K]."""
    fff = isinstance(layer, FFF)
    scores, leaf = functional.descend(
        tokens,
        *layer._tree_weights()[:2],
        trees=layer.parallel_size,
        tie_right=fff,
    )
    return (scores, leaf) if fff else (scores[..., :-1], leaf // 2)


def _tokens(owner: str, layer: Layer, x: Tensor) -> Tensor:
    """[tokens, in]"""
    if not isinstance(layer, FFF | UltraFFF):
        reject(owner, "layer", "an FFF or UltraFFF", type(layer).__name__)
    if x.dim() == 0 or x.shape[-1] != layer.input_width or not x.numel():
        expected = f"shape [..., {layer.input_width}] with at least one token"
        reject(owner, "x", expected, list(x.shape))
    return x.detach().reshape(-1, x.shape[-1]).to(layer.node_weights.dtype)


def _mean(values: Tensor) -> float:
    return values.double().mean().item() if values.numel() else 0.0
