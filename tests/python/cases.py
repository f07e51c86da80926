"""Random trees for the tests, and a literal walk down a tree, token by token."""

from dataclasses import dataclass, replace

import torch

from tolerances import MARGIN
from torch_fff.reference import ACTIVATIONS

WEIGHTS = ("node_weight", "node_bias", "node_output", "w1", "b1", "w2", "b2")
DIFFERENTIABLE = ("x", *WEIGHTS)


@dataclass
class TreeCase:
    """Arguments of ``tree``: ``tensors`` (absent ones left out) and ``options``."""

    tensors: dict
    options: dict

    @property
    def inputs(self):
        """The differentiable tensors that are present."""
        return {name: t for name, t in self.tensors.items() if name in DIFFERENTIABLE}

    def arguments(self):
        """Positional arguments of torch.ops.fff.tree."""
        names = (*DIFFERENTIABLE, "noise", "leaf_scale", "alternates")
        defaults = {
            "trees": 1,
            "tie_right": True,
            "node_activation": "identity",
            "leaf_activation": "relu",
            "straight_through": False,
            "slope": 1.0,
            "min_slope": 0.0,
            "row_sparse_grad": False,
        }
        options = defaults | self.options
        return (*map(self.tensors.get, names), *(options[name] for name in defaults))

    def backward_arguments(self):
        """Those of them that tree_backward has as well."""
        return self.arguments()[:-1]

    def run(self, function):
        return function(**self.tensors, **self.options)

    def to(self, dtype):
        """The same numbers in another dtype."""
        return replace(self, tensors={name: t.to(dtype) for name, t in self.tensors.items()})

    def requires_grad(self):
        """Differentiable inputs as leaves that want a gradient."""
        tensors = dict(self.tensors)
        for name, tensor in self.inputs.items():
            tensors[name] = tensor.detach().requires_grad_()
        return replace(self, tensors=tensors)

    def gradients(self, function, grad_output, grad_scores):
        """What ``function`` returns, and the gradient of each of ``inputs``.

        A gradient of an output may be None: nothing depends on it.
        """
        case = self.requires_grad()
        result = case.run(function)
        pairs = ((result[0], grad_output), (result[1], grad_scores))
        given = [pair for pair in pairs if pair[1] is not None]
        outputs, grads = zip(*given, strict=True)
        gradients = torch.autograd.grad(
            outputs, list(case.inputs.values()), grads, materialize_grads=True
        )
        return result, dict(zip(case.inputs, gradients, strict=True))


def make_case(
    *,
    dtype=torch.float64,
    device=None,
    tokens=(7,),
    width=16,
    levels=3,
    trees=1,
    leaf_width=4,
    out=8,
    node_bias=True,
    node_output=False,
    b1=True,
    b2=True,
    noise=False,
    leaf_scale=False,
    alternates=False,
    contiguous=True,
    bias_shift=0.0,
    **options,
):
    """A random tree and tokens. ``leaf_width=None`` makes a tree of neurons.

    On torch's default device unless ``device`` is given.

    No token lies within the dtype's margin of a decision boundary, of the slope ``min_slope`` or of
    a ReLU's kink.
    """
    exact = torch.float64 if dtype == torch.float64 else torch.float32

    def random(*shape, scale=1.0):
        return (torch.randn(shape, dtype=torch.float64) * scale).to(device, dtype)

    nodes, leaves = trees * (2**levels - 1), trees * 2**levels
    tensors = {"x": None, "node_weight": random(nodes, width, scale=width**-0.5)}
    if node_bias:
        tensors["node_bias"] = random(nodes, scale=0.5) + bias_shift
    if node_output or leaf_width is None:
        tensors["node_output"] = random(nodes, out)
    if leaf_width is not None:
        tensors["w1"] = random(leaves, leaf_width, width, scale=width**-0.5)
        if b1:
            tensors["b1"] = random(leaves, leaf_width, scale=0.5)
        tensors["w2"] = random(leaves, leaf_width, out)
        if b2:
            tensors["b2"] = random(leaves, out)
    if noise:
        tensors["noise"] = torch.randn(*tokens, trees, levels, dtype=exact, device=device)
    if leaf_scale:
        keep = torch.rand(*tokens, trees, leaf_width, device=device) < 0.7
        tensors["leaf_scale"] = keep.to(exact) / 0.7
    if alternates:
        drawn = torch.rand(*tokens, trees, levels, device=device) < 0.4
        tensors["alternates"] = drawn.to(exact) / 0.4
    case = TreeCase(tensors, {"trees": trees, **options})

    x = tensors["x"] = random(*tokens, width)
    while (near := _distance_to_kinks(case) < MARGIN[dtype]).any():
        x[near] = random(*tokens, width)[near]
    if not contiguous:
        for name, tensor in tensors.items():
            tensors[name] = torch.stack((tensor, tensor), -1)[..., 0]
    return case


def _distance_to_kinks(case):
    """Smallest |score|, |score + noise|, |share of the greatest slope - min_slope| and
    |pre-activation| of each token, in all trees."""
    double = {name: t.double() for name, t in case.tensors.items()}
    scores = double["x"] @ double["node_weight"].T + double.get("node_bias", 0.0)
    values = [scores.new_full((*scores.shape[:-1], 1), torch.inf), scores]
    if case.options.get("min_slope"):
        right = torch.sigmoid(case.options.get("slope", 1.0) * scores)
        values.append(4 * right * (1 - right) - case.options["min_slope"])
    if "noise" in double:
        trees, levels = double["noise"].shape[-2:]
        heap = scores.unflatten(-1, (trees, 2**levels - 1))
        of_node = [level for level in range(levels) for _ in range(2**level)]
        values.append((heap + double["noise"][..., of_node]).flatten(-2))
    if "w1" in double:
        pre = torch.einsum("...i,fli->...fl", double["x"], double["w1"]) + double.get("b1", 0.0)
        values.append(pre.flatten(-2))
    return torch.cat(values, -1).abs().amin(-1)


def walk(
    x,
    node_weight,
    node_bias=None,
    node_output=None,
    w1=None,
    b1=None,
    w2=None,
    b2=None,
    *,
    noise=None,
    leaf_scale=None,
    trees=1,
    tie_right=True,
    node_activation="identity",
    leaf_activation="relu",
):
    """``tree`` for tokens x [tokens, in], as a loop over tokens, trees and levels."""
    nodes = node_weight.shape[0] // trees
    levels = (nodes + 1).bit_length() - 1
    outputs, scores, leaves = [], [], []
    for t, token in enumerate(x):
        output = 0.0
        for k in range(trees):
            node = 0
            for level in range(levels):
                row = k * nodes + node
                score = token @ node_weight[row]
                if node_bias is not None:
                    score = score + node_bias[row]
                scores.append(score)
                if node_output is not None:
                    output = output + ACTIVATIONS[node_activation](score) * node_output[row]
                noisy = score if noise is None else score + noise[t, k, level]
                node = 2 * node + 1 + bool(noisy >= 0 if tie_right else noisy > 0)
            leaf = node - nodes
            if w1 is None:
                leaf = leaf // 2
            else:
                row = k * (nodes + 1) + leaf
                hidden = w1[row] @ token
                if b1 is not None:
                    hidden = hidden + b1[row]
                hidden = ACTIVATIONS[leaf_activation](hidden)
                if leaf_scale is not None:
                    hidden = hidden * leaf_scale[t, k]
                output = output + hidden @ w2[row]
                if b2 is not None:
                    output = output + b2[row]
            leaves.append(leaf)
        outputs.append(output)
    shape = (len(x), trees)
    return (
        torch.stack(outputs),
        torch.stack(scores).reshape(*shape, levels) if scores else x.new_empty(*shape, 0),
        torch.tensor(leaves, device=x.device).reshape(shape),
    )
