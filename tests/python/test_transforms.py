"""torch.func: vmap, grad, jacrev and per-sample gradients of the functional layer."""

from dataclasses import replace

import pytest
import torch
from torch.func import functional_call, grad, jacrev, vmap

from cases import make_case
from tolerances import assert_close
from torch_fff import functional, reference

FFF = {"trees": 2, "tokens": (4,), "straight_through": True, "leaf_activation": "gelu"}
NEURONS = {**FFF, "leaf_width": None, "node_activation": "gelu"}
BOTH = {**FFF, "node_output": True, "noise": True, "leaf_scale": True, "alternates": True}
TREES = [FFF, NEURONS, BOTH]
TOKENWISE = {"x", "noise", "leaf_scale", "alternates"}


def looped(function, batch, tensors, batched):
    """``function`` on every sample by itself, the outputs stacked."""
    results = [
        function({name: t[i] if name in batched else t for name, t in tensors.items()})
        for i in range(batch)
    ]
    return tuple(torch.stack(result) for result in zip(*results, strict=True))


def batch_of(options, batched):
    """Tensors of a case, three different values in front of those whose name is in ``batched``."""
    cases = [make_case(**options) for _ in range(3)]
    return {
        name: torch.stack([case.tensors[name] for case in cases]) if name in batched else tensor
        for name, tensor in cases[0].tensors.items()
    }


@pytest.mark.parametrize("options", TREES, ids=["fff", "neurons", "both"])
@pytest.mark.parametrize("side", ["tokens", "noise", "weights", "everything", "bias"])
@pytest.mark.parametrize("through", ["functional", "op"])
def test_vmap_of_tree(options, side, through):
    case = make_case(**options)
    every = set(case.tensors)
    batched = {
        "tokens": TOKENWISE & every,
        "noise": (TOKENWISE - {"x"}) & every or {"x"},
        "weights": every - TOKENWISE,
        "everything": every,
        "bias": {"node_bias"},
    }[side]
    tensors = batch_of(options, batched)

    def function(tensors):
        sample = replace(case, tensors=tensors)
        if through == "op":
            return torch.ops.fff.tree(*sample.arguments())
        return sample.run(functional.tree)

    in_dims = ({name: 0 if name in batched else None for name in tensors},)
    actual = vmap(function, in_dims=in_dims)(tensors)
    for a, e in zip(actual, looped(function, 3, tensors, batched), strict=True):
        assert_close(a, e, torch.float64)


def test_vmap_of_other_dimensions():
    """The batch may be any dimension, and vmap may be nested."""
    case = make_case(tokens=(4, 5, 6))
    x = case.tensors.pop("x")

    def output(tokens):
        return functional.tree(tokens, **case.tensors).output

    expected = output(x)
    assert_close(vmap(output, in_dims=1, out_dims=1)(x), expected)
    assert_close(vmap(output, in_dims=2, out_dims=1)(x.movedim(1, 2)), expected)
    assert_close(vmap(vmap(output))(x), expected)
    assert_close(vmap(vmap(vmap(output)))(x), expected)


@pytest.mark.parametrize("batched", ["x", "node_weight", "noise"])
def test_vmap_of_descend(batched):
    tensors = batch_of({"trees": 2, "noise": True}, {batched})
    tensors = {k: tensors[k] for k in ("x", "node_weight", "node_bias", "noise")}

    def function(tensors):
        return functional.descend(**tensors, trees=2)

    actual = vmap(function, in_dims=({k: 0 if k == batched else None for k in tensors},))(tensors)
    for a, e in zip(actual, looped(function, 3, tensors, {batched}), strict=True):
        assert_close(a, e, torch.float64)


@pytest.mark.parametrize("in_dims", [(0, 0), (1, None), (None, 0)], ids=str)
def test_vmap_of_gated_activation(in_dims):
    def argument(dim, width):
        shape = [3, 4] if dim == 0 else [4, 3] if dim == 1 else [4]
        return torch.randn(*shape, width, dtype=torch.float64)

    pre, mixture = argument(in_dims[0], 12), argument(in_dims[1], 4)
    actual = vmap(functional.gated_activation, in_dims=in_dims)(pre, mixture)
    expected = vmap(reference.gated_activation, in_dims=in_dims)(pre, mixture)
    assert_close(actual, expected)


@pytest.mark.parametrize("options", TREES, ids=["fff", "neurons", "both"])
def test_grad_of_tree(options):
    """torch.func.grad gives what autograd gives."""
    case = make_case(**options)
    g = torch.randn(4, 8, dtype=torch.float64)
    scores = case.run(functional.tree).scores
    _, expected = case.gradients(functional.tree, g, torch.ones_like(scores))
    constant = {k: t for k, t in case.tensors.items() if k not in case.inputs}

    def loss(inputs):
        result = functional.tree(**inputs, **constant, **case.options)
        return (result.output * g).sum() + result.scores.sum()

    for name, gradient in grad(loss)(case.inputs).items():
        assert_close(gradient, expected[name], name=name)


@pytest.mark.parametrize("options", TREES, ids=["fff", "neurons", "both"])
def test_per_sample_gradients_of_tree(options):
    """vmap over grad: every token has weight gradients of its own."""
    case = make_case(**options)
    weights = {k: t for k, t in case.inputs.items() if k != "x"}
    tokens = {k: t for k, t in case.tensors.items() if k in TOKENWISE}

    def loss(function):
        return lambda w, t: function(**w, **t, **case.options).output.square().sum()

    actual = vmap(grad(loss(functional.tree)), in_dims=(None, 0))(weights, tokens)
    expected = vmap(grad(loss(reference.tree)), in_dims=(None, 0))(weights, tokens)
    for name, gradient in actual.items():
        assert gradient.shape == (4, *weights[name].shape)
        assert_close(gradient, expected[name], name=name)
    # They add up to the gradient of the sum.
    total = grad(loss(functional.tree))(weights, tokens)
    for name, gradient in actual.items():
        assert_close(gradient.sum(0), total[name], name=name)


def test_gradient_through_vmap():
    """An ensemble: batched weights, shared tokens, gradients by ordinary autograd."""
    options = {"trees": 2, "straight_through": True}
    case = make_case(**options)
    x = case.tensors.pop("x")
    weights = {k: t for k, t in batch_of(options, case.tensors).items() if k != "x"}
    leaves = [t.requires_grad_() for t in weights.values()]

    actual = vmap(lambda w: functional.tree(x, **w, **case.options).output)(weights)
    expected = torch.stack(
        [
            functional.tree(x, **{k: t[i] for k, t in weights.items()}, **case.options).output
            for i in range(3)
        ]
    )
    assert_close(actual, expected)
    g = torch.randn_like(expected)
    gradients = (torch.autograd.grad(output, leaves, g) for output in (actual, expected))
    for a, e in zip(*gradients, strict=True):
        assert_close(a, e)


def test_gradient_of_scores_alone():
    case = make_case()
    weight = case.tensors.pop("node_weight")

    def scores(function):
        return lambda w: function(node_weight=w, **case.tensors).scores.square().sum()

    assert_close(grad(scores(functional.tree))(weight), grad(scores(reference.tree))(weight))


def test_jacobian():
    case = make_case(tokens=(), straight_through=True)
    x = case.tensors.pop("x")

    def output(function):
        return lambda x: function(x, **case.tensors, **case.options).output

    assert_close(jacrev(output(functional.tree))(x), jacrev(output(reference.tree))(x))


def test_per_sample_gradients_of_soft_tree():
    case = make_case(trees=2, node_output=True, leaf_activation="gelu")
    x = case.tensors.pop("x")

    def loss(function):
        return lambda w, x: function(x, **w, **case.options).output.square().sum()

    actual = vmap(grad(loss(functional.soft_tree)), in_dims=(None, 0))(case.tensors, x)
    expected = vmap(grad(loss(reference.soft_tree)), in_dims=(None, 0))(case.tensors, x)
    for name, gradient in actual.items():
        assert_close(gradient, expected[name], name=name)


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (lambda x, case: functional.tree(x, **case.tensors).output, "tree"),
        (lambda x, case: functional.leaf_mixture(x[:, :7]), "leaf_mixture"),
        (
            lambda x, case: functional.gated_activation(x, x[:, :4], "gelu"),
            "gated_activation",
        ),
    ],
    ids=["tree", "leaf_mixture", "gated_activation"],
)
def test_no_double_backward(function, op):
    case = make_case()
    x = case.tensors.pop("x")
    once = grad(lambda x: function(x, case).square().sum())
    assert once(x).abs().sum() > 0
    with pytest.raises(RuntimeError, match=f"fff::{op}_backward cannot be differentiated"):
        grad(lambda x: once(x).sum())(x)


def test_layer_in_functional_call():
    """The module's way into torch.func."""
    layer = torch.nn.Module()
    case = make_case(dtype=torch.float32)
    x = case.tensors.pop("x")
    for name, tensor in case.tensors.items():
        layer.register_parameter(name, torch.nn.Parameter(tensor))
    layer.forward = lambda x: functional.tree(x, **dict(layer.named_parameters())).output

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).square().sum()

    gradients = vmap(grad(loss), in_dims=(None, 0))(case.tensors, x)
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert_close(gradients[name].sum(0), parameter.grad, name=name)
