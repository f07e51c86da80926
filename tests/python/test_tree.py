"""fff::tree and fff::tree_backward against the float64 reference."""

import math
import random

import pytest
import torch

from cases import DIFFERENTIABLE, TreeCase, make_case, walk
from tolerances import assert_close
from torch_fff import functional, reference
from torch_fff.reference import ACTIVATIONS

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

FFF = [
    {},
    *({"tokens": tokens} for tokens in [(), (0,), (1,), (64,), (300,), (2, 3, 5), (2, 0, 3)]),
    *({"width": width} for width in [1, 3, 33, 784]),
    *({"levels": levels} for levels in [0, 1, 2, 4, 5, 6]),
    {"levels": 9, "tokens": (20,), "width": 33, "leaf_width": 1},
    *({"trees": trees, "tokens": (9,)} for trees in [2, 3]),
    *({"leaf_width": leaf_width} for leaf_width in [1, 2, 8, 33]),
    *({"out": out} for out in [1, 3, 33, 100]),
    *({"leaf_activation": activation} for activation in ACTIVATIONS),
    {"node_bias": False},
    {"b1": False},
    {"b2": False},
    {"b1": False, "b2": False, "levels": 0, "trees": 2},
    {"noise": True},
    {"leaf_scale": True},
    {"contiguous": False, "noise": True, "leaf_scale": True, "tokens": (2, 3)},
    {"contiguous": False, "alternates": True, "tokens": (2, 30)},
    {"min_slope": 0.5, "tokens": (64,), "levels": 5},
    {"tie_right": False},
    {"bias_shift": 10.0, "tokens": (64,)},
    {"bias_shift": -10.0, "tokens": (64,), "trees": 2},
]
NODE_OUTPUTS = [
    *({"node_activation": activation} for activation in ACTIVATIONS),
    {"levels": 0},
    {"levels": 5, "trees": 3, "noise": True, "leaf_scale": True, "tokens": (2, 3, 5)},
    {"contiguous": False, "width": 33, "leaf_width": 33, "out": 33},
]
NEURONS = [
    *({"node_activation": activation} for activation in ACTIVATIONS),
    *({"levels": levels} for levels in [1, 2, 4, 7]),
    {"levels": 9, "tokens": (20,), "width": 33},
    *({"tokens": tokens, "trees": 2} for tokens in [(), (0,), (1,), (64,), (2, 3, 5)]),
    *({"width": width, "out": width} for width in [1, 3, 33, 784]),
    {"node_bias": False, "trees": 3, "tie_right": False},
    {"noise": True, "contiguous": False, "trees": 3},
    {"alternates": True, "min_slope": 0.3, "levels": 6, "tokens": (300,), "trees": 2},
    {"bias_shift": 10.0, "tokens": (64,)},
    # Shallow forests, large enough for dense products; the last two are beyond their border.
    {"levels": 1, "trees": 300, "tokens": (2, 10), "width": 400},
    {"levels": 1, "trees": 700, "tokens": (), "width": 3000, "out": 5},
    {"levels": 2, "trees": 90, "tokens": (20,), "width": 400, "tie_right": False},
    {"levels": 3, "trees": 40, "tokens": (20,), "width": 400, "noise": True, "contiguous": False},
    {"levels": 4, "trees": 20, "tokens": (20,), "width": 400, "node_bias": False},
    # The same on a GPU.
    {"levels": 5, "trees": 4, "tokens": (300,), "width": 100, "noise": True},
    {"levels": 5, "trees": 4, "tokens": (300,), "width": 120, "alternates": True, "min_slope": 0.3},
    {"levels": 4, "trees": 4, "tokens": (300,), "width": 120},
    {"levels": 2, "trees": 200, "tokens": (15,), "width": 400},
]


def mixed(count):
    """Random combinations of all options."""
    draw = random.Random(0)
    for _ in range(count):
        leaf_width = draw.choice([None, 1, 2, 5, 8, 17])
        yield {
            "tokens": draw.choice([(1,), (7,), (33,), (130,), (3, 4), (2, 1, 9)]),
            "width": draw.choice([2, 7, 8, 31, 64, 100]),
            "levels": draw.randint(1 if leaf_width is None else 0, 6),
            "trees": draw.choice([1, 1, 2, 3, 5]),
            "leaf_width": leaf_width,
            "out": draw.choice([1, 2, 8, 15, 64]),
            "node_output": draw.random() < 0.4,
            **{name: draw.random() < 0.6 for name in ("node_bias", "b1", "b2", "noise")},
            "leaf_scale": leaf_width is not None and draw.random() < 0.4,
            "alternates": draw.random() < 0.4,
            "min_slope": draw.choice([0.0, 0.5]),
            "contiguous": draw.random() < 0.7,
            "tie_right": draw.random() < 0.5,
            "node_activation": draw.choice(list(ACTIVATIONS)),
            "leaf_activation": draw.choice(list(ACTIVATIONS)),
        }


CASES = [
    *FFF,
    *({"node_output": True, "node_activation": "gelu", **options} for options in NODE_OUTPUTS),
    *({"leaf_width": None, "node_activation": "gelu", **options} for options in NEURONS),
    *mixed(25),
]
PASSES = [
    *((dtype, False) for dtype in (torch.float64, torch.float32)),
    *((dtype, True) for dtype in DTYPES),
]


def label(options):
    return " ".join(f"{name}={value}" for name, value in options.items()) or "plain"


@pytest.mark.parametrize("options", CASES, ids=label)
@pytest.mark.parametrize(("dtype", "straight_through"), PASSES, ids=str)
def test_equals_reference(device, dtype, options, straight_through):
    routing = {"straight_through": straight_through, "slope": 2.5}
    case = make_case(dtype=dtype, device=device, **options, **routing)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = case.run(functional.tree)
    grad_output = torch.randn_like(shapes.output)
    grad_scores = torch.randn_like(shapes.scores)
    actual, gradients = case.gradients(functional.tree, grad_output, grad_scores)
    expected, expected_gradients = case.to(torch.float64).gradients(
        reference.tree, grad_output.double(), grad_scores.double()
    )

    assert actual.output.dtype == dtype
    assert actual.scores.dtype == exact
    assert all(t.is_contiguous() for t in actual)
    assert torch.equal(actual.leaf, expected.leaf)
    assert_close(actual.output, expected.output, dtype, "output")
    assert_close(actual.scores, expected.scores, exact, "scores")
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        assert_close(gradient, expected_gradients[name], dtype, name)


@pytest.mark.parametrize(
    "options", [{}, {"leaf_width": None, "trees": 2}, {"node_output": True, "trees": 2}], ids=label
)
def test_without_grad(options):
    case = make_case(**options)
    expected = case.run(functional.tree)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for actual, wanted in zip(case.run(functional.tree), expected, strict=True):
                assert torch.equal(actual, wanted)


GRADCHECK = [
    {"leaf_activation": "gelu"},
    {"leaf_activation": "silu", "noise": True, "leaf_scale": True, "trees": 2, "levels": 2},
    {"leaf_activation": "gelu_tanh", "node_output": True, "node_activation": "relu"},
    {"leaf_activation": "relu", "levels": 0},
    {"leaf_width": None, "node_activation": "gelu", "trees": 2, "levels": 2},
    {"leaf_width": None, "node_activation": "identity", "noise": True, "node_bias": False},
]


@pytest.mark.parametrize("options", GRADCHECK, ids=label)
def test_gradcheck(device, options):
    """Finite differences: without straight-through, and away from decision boundaries."""
    small = {"tokens": (2, 2), "width": 3, "leaf_width": 2, "out": 2}
    case = make_case(device=device, **(small | options)).requires_grad()

    def function(*inputs):
        tensors = case.tensors | dict(zip(case.inputs, inputs, strict=True))
        return TreeCase(tensors, case.options).run(functional.tree)[:2]

    assert torch.autograd.gradcheck(function, tuple(case.inputs.values()))


@pytest.mark.parametrize("options", GRADCHECK, ids=label)
def test_straight_through_equals_dense(device, options):
    case = make_case(device=device, **options, tokens=(20,), straight_through=True, slope=0.7)
    output, scores, _ = case.run(reference.tree)
    g, g_scores = torch.randn_like(output), torch.randn_like(scores)
    _, expected = case.gradients(reference.tree, g, g_scores)
    for name, gradient in case.gradients(functional.tree, g, g_scores)[1].items():
        assert_close(gradient, expected[name], name=name)


@pytest.mark.parametrize("options", [{}, {"leaf_width": None}], ids=label)
def test_no_double_backward(options):
    case = make_case(**options).requires_grad()
    output = case.run(functional.tree).output
    (gradient,) = torch.autograd.grad(output.sum(), case.tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="fff::tree_backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("wanted", [n for n in DIFFERENTIABLE if n != "node_output"])
def test_gradient_of_one_input(wanted):
    case = make_case(straight_through=True)
    result, every = case.gradients(functional.tree, torch.ones(7, 8).double(), None)
    case.tensors[wanted].requires_grad_()
    result = case.run(functional.tree)
    assert not result.leaf.requires_grad
    (alone,) = torch.autograd.grad(result.output.sum(), case.tensors[wanted])
    assert torch.equal(alone, every[wanted])


def test_gradient_of_one_output():
    """Either output may have no gradient, as when a loss is on the scores alone."""
    case = make_case(node_output=True)
    output, scores, _ = case.run(reference.tree)
    for grads in [(torch.randn_like(output), None), (None, torch.randn_like(scores))]:
        actual, expected = (case.gradients(f, *grads)[1] for f in (functional.tree, reference.tree))
        for name, gradient in actual.items():
            assert_close(gradient, expected[name], name=name)


def test_output_mask():
    case = make_case(node_bias=False, node_output=True)
    arguments = case.arguments()
    _, scores, leaf = torch.ops.fff.tree(*arguments)
    g = torch.ones(7, 8, dtype=torch.float64)
    backward = torch.ops.fff.tree_backward
    routes = (scores, leaf, *case.backward_arguments())
    every = backward(g, None, *routes, [True, True, True])
    assert [t.numel() > 0 for t in every] == [t is not None for t in arguments[:8]]
    for mask, kept in [
        ([True, False, False], {0}),
        ([False, True, False], {1, 2, 3}),
        ([False, False, True], {4, 5, 6, 7}),
    ]:
        for i, gradient in enumerate(backward(g, None, *routes, mask)):
            assert torch.equal(gradient, every[i] if i in kept else g.new_empty(0))


@pytest.mark.parametrize("tie_right", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties(device, dtype, tie_right):
    """Scores of exactly zero; -0 is zero, and a NaN goes left."""
    x = torch.tensor([[0.0], [-0.0], [math.nan], [1.0], [-1.0]], dtype=dtype, device=device)
    weight = torch.ones(1, 1, dtype=dtype, device=device)
    scores, leaf = functional.descend(x, weight, tie_right=tie_right)
    assert leaf.flatten().tolist() == [int(tie_right), int(tie_right), 0, 1, 0]
    assert_close(scores.flatten(), x.flatten(), dtype)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "options",
    [
        {"trees": 2},
        {"levels": 0},
        {"node_output": True, "node_activation": "relu", "noise": True, "leaf_scale": True},
        {"leaf_width": None, "trees": 2, "node_activation": "gelu"},
        {"leaf_width": None, "levels": 1, "node_activation": "relu"},
    ],
    ids=label,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_that_are_not_finite(device, dtype, options, value):
    """One bad token: NaN gives NaN, Inf what the definition gives, and no other token notices."""
    case = make_case(dtype=dtype, device=device, **options)
    clean, gradients = case.gradients(functional.tree, torch.ones(7, 8).to(device, dtype), None)
    case.tensors["x"][2, 1] = value
    actual, bad_gradients = case.gradients(
        functional.tree, torch.ones(7, 8).to(device, dtype), None
    )
    others = [0, 1, 3, 4, 5, 6]
    assert torch.equal(actual.leaf[others], clean.leaf[others])
    assert_close(actual.output[others], clean.output[others])
    assert_close(actual.scores[others], clean.scores[others])
    assert_close(bad_gradients["x"][others], gradients["x"][others])
    expected = case.to(torch.float64).run(walk)
    assert torch.equal(actual.leaf[2], expected[2][2])
    assert_close(actual.output[2], expected[0][2], dtype)
    if math.isnan(value):
        assert actual.output[2].isnan().all()


def test_one_leaf_takes_all():
    case = make_case(tokens=(300,), trees=2, bias_shift=20.0, width=33)
    assert (case.run(functional.tree).leaf == 7).all()
    case.tensors["node_bias"] -= 40
    assert (case.run(functional.tree).leaf == 0).all()


def test_same_values_twice(device):
    """Gradients are sums in a fixed order."""
    case = make_case(
        dtype=torch.float32, device=device, tokens=(2000,), trees=2, straight_through=True
    )
    g = torch.randn(2000, 8, device=device)
    first, second = (case.gradients(functional.tree, g, None)[1] for _ in range(2))
    for name, gradient in first.items():
        assert torch.equal(gradient, second[name])
