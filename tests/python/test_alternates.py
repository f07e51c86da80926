"""Straight-through gradients of some decisions: drawn ones, and those that are steep enough."""

from itertools import combinations

import pytest
import torch

from cases import make_case
from tolerances import assert_close
from torch_fff import FFF, UltraFFF, functional, reference
from torch_fff._routing import drawn_alternates

TREES = [{"trees": 2, "node_output": True}, {"leaf_width": None, "levels": 4, "trees": 2}]
IDS = ["fff", "neurons"]
EXACT = {"rtol": 1e-11, "atol": 1e-12}


def layers(**options):
    """Both layers, with three decisions on a path."""
    options |= {"parallel_size": 2, "routing_gradient": "straight_through", "dtype": torch.float64}
    return [
        FFF(6, 2, 4, 3, "gelu", train_hardened=True, node_output=True, **options),
        UltraFFF(6, 4, 3, **options),
    ]


def gradients(layer, output):
    names, parameters = zip(*layer.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(output.sin().sum(), parameters), strict=True))


def expected_output(layer, x, **options):
    names = ("node_weights", "node_biases", "node_outputs", "w1", "b1", "w2", "b2")
    weights = [getattr(layer, name, None) for name in names]
    return reference.tree(
        x,
        *weights,
        trees=2,
        tie_right=isinstance(layer, FFF),
        node_activation="gelu",
        leaf_activation="gelu",
        straight_through=True,
        **options,
    ).output


@pytest.mark.parametrize("function", [functional.tree, reference.tree], ids=["op", "reference"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("options", TREES, ids=IDS)
def test_mean_over_all_draws_is_the_whole_gradient(options, count, function):
    case = make_case(**options, straight_through=True, tokens=(20,), leaf_activation="gelu")
    output, scores, _ = case.run(reference.tree)
    g = torch.randn_like(output)
    _, expected = case.gradients(function, g, None)
    total = dict.fromkeys(expected, 0.0)
    draws = list(combinations(range(3), count))
    for drawn in draws:
        case.tensors["alternates"] = torch.zeros_like(scores)
        case.tensors["alternates"][..., drawn] = 3 / count
        _, gradients = case.gradients(function, g, None)
        assert not torch.allclose(gradients["node_weight"], expected["node_weight"])
        total = {name: total[name] + gradient for name, gradient in gradients.items()}
    for name, gradient in expected.items():
        assert_close(total[name] / len(draws), gradient, name=name)


@pytest.mark.parametrize("levels", [3, 4])
@pytest.mark.parametrize("count", [1, 2])
def test_every_token_and_tree_draws_for_itself(count, levels):
    factors = drawn_alternates(torch.zeros(1000, 5), 2, levels, 3, count)
    assert factors.shape == (1000, 2, levels)
    assert set(factors.unique().tolist()) == {0, torch.tensor(3 / count).item()}
    drawn = factors[..., :3] > 0
    assert (drawn.sum(-1) == count).all()
    assert (factors[..., 3:] == 0).all()
    assert drawn.double().mean(0).sub(count / 3).abs().max() < 0.07
    assert not torch.equal(drawn[:, 0], drawn[:, 1])


@pytest.mark.parametrize("i", [0, 1], ids=IDS)
def test_layers_draw_in_training_with_torch_s_generator(i):
    layer = layers(alternates=2)[i]
    x = torch.randn(5, 6, 6, dtype=torch.float64)
    torch.manual_seed(3)
    actual = gradients(layer, layer(x))
    torch.manual_seed(3)
    alternates = drawn_alternates(x, 2, 3 + i, 3, 2)
    expected = gradients(layer, expected_output(layer, x, alternates=alternates))
    torch.testing.assert_close(actual, expected, **EXACT)
    evaluated = gradients(layer, layer.eval()(x))
    torch.testing.assert_close(evaluated, gradients(layer, expected_output(layer, x)), **EXACT)


@pytest.mark.parametrize("i", [0, 1], ids=IDS)
@pytest.mark.parametrize("count", [None, 3, 100])
def test_as_many_as_there_are_decisions_draws_nothing(count, i):
    layer = layers(alternates=count)[i]
    x = torch.randn(30, 6, dtype=torch.float64)
    state = torch.get_rng_state()
    actual = gradients(layer, layer(x))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(actual, gradients(layer, expected_output(layer, x)), **EXACT)


@pytest.mark.parametrize("i", [0, 1], ids=IDS)
def test_min_slope_of_layers_is_the_reference_s(i):
    layer = layers(min_slope=0.9, slope=2.0)[i]
    x = torch.randn(30, 6, dtype=torch.float64)
    actual = gradients(layer, layer(x))
    expected = expected_output(layer, x, slope=2.0, min_slope=0.9)
    torch.testing.assert_close(actual, gradients(layer, expected), **EXACT)
    whole = gradients(layer, expected_output(layer, x, slope=2.0))
    assert not torch.allclose(actual["node_weights"], whole["node_weights"])


def test_min_slope_cuts_at_its_share_of_the_greatest_slope():
    """sigmoid'(z) = 1/4 at 0; a share of 0.75 is reached at z = ln 3."""
    x = torch.tensor([[1.0], [1.2], [-1.0], [-1.2]], dtype=torch.float64)  # ln 3 = 1.0986
    weights = {
        "node_weight": torch.ones(1, 1),
        "w1": torch.zeros(2, 1, 1),
        "w2": torch.zeros(2, 1, 1),
        "b2": torch.tensor([[0.0], [1.0]]),
    }
    weights = {name: w.double() for name, w in weights.items()}
    for function in (functional.tree, reference.tree):
        for slope, kept in ((1.0, [True, False, True, False]), (2.0, [False] * 4)):
            token = x.clone().requires_grad_()
            options = {"straight_through": True, "slope": slope, "min_slope": 0.75}
            function(token, **weights, **options).output.sum().backward()
            assert (token.grad.flatten() != 0).tolist() == kept


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("levels", [3, 5])
@pytest.mark.parametrize("leaf_width", [2, None], ids=IDS)
def test_branches_without_a_gradient_are_not_evaluated(leaf_width, levels, dtype):
    """All tokens go right. NaN weights left of a decision show who evaluates that branch."""
    options = {"straight_through": True, "bias_shift": 20.0, "slope": 0.1, "tokens": (40,)}
    case = make_case(dtype=dtype, levels=levels, leaf_width=leaf_width, **options)
    output, scores, leaf = case.run(functional.tree)
    decisions = levels if leaf_width else levels - 1
    assert (leaf == 2**decisions - 1).all()
    whole = case.tensors
    for level in range(decisions):
        case.tensors = {name: t.clone() for name, t in whole.items()}
        for below in range(level + 1, levels + 1):
            first = 2**below - 2 ** (below - level)  # left child of the last node of `level`
            count = 2 ** (below - level - 1)
            if below < levels:
                rows = slice(2**below - 1 + first, 2**below - 1 + first + count)
                case.tensors["node_weight"][rows] = torch.nan
            elif leaf_width:
                case.tensors["w1"][first : first + count] = torch.nan
        for evaluated in (False, True):
            alternates = torch.full_like(scores, float(not evaluated))
            alternates[..., level] = float(evaluated)
            case.tensors["alternates"] = alternates
            _, gradients = case.gradients(functional.tree, torch.ones_like(output), None)
            assert gradients["x"].isfinite().all() != evaluated
        case.tensors["alternates"][:] = 1
        case.options["min_slope"] = 1.0
        _, gradients = case.gradients(functional.tree, torch.ones_like(output), None)
        assert gradients["x"].isfinite().all()
        case.options["min_slope"] = 0.0
