"""The reference against the published package, a loop, and the written-out gradient."""

import pytest
import torch
from fastfeedforward import FFF as PublishedFFF
from torch import nn

from cases import make_case, walk
from tolerances import assert_close
from torch_fff import reference
from torch_fff.functional import bernoulli_entropy

pytestmark = pytest.mark.cpu


def published(depth, **options):
    """A layer of the published package, and its parameters as arguments of the reference."""
    layer = PublishedFFF(12, 5, 6, depth, **options)
    weights = (
        layer.node_weights,
        layer.node_biases.flatten(),
        None,
        layer.w1s.transpose(1, 2),
        layer.b1s,
        layer.w2s,
        layer.b2s,
    )
    return layer, weights


def gradients(layer, x, loss):
    parameters = [p for p in layer.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, [x, *parameters], materialize_grads=True)


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize(("activation", "name"), [(nn.ReLU(), "relu"), (nn.GELU(), "gelu")])
def test_soft_equals_published(depth, activation, name):
    layer, weights = published(depth, activation=activation)
    x = torch.randn(9, 12, requires_grad=True)
    expected, entropies = layer(x, return_entropies=True)
    result = reference.soft_tree(x, *weights, leaf_activation=name)
    own_entropies = bernoulli_entropy(result.node_logits).squeeze(1).mean(0)
    assert_close(result.output, expected)
    assert_close(own_entropies, entropies)

    g = torch.randn_like(expected)
    actual = gradients(layer, x, (result.output * g).sum() + 3 * own_entropies.sum())
    wanted = gradients(layer, x, (expected * g).sum() + 3 * entropies.sum())
    for a, b in zip(actual, wanted, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_hard_equals_published(depth):
    layer, weights = published(depth)
    x = torch.randn(9, 12, requires_grad=True)
    expected = layer(x, use_hard_decisions=True)
    result = reference.tree(x, *weights)
    assert_close(result.output, expected)
    for a, b in zip(
        gradients(layer, x, result.output.square().sum()),
        gradients(layer, x, expected.square().sum()),
        strict=True,
    ):
        assert_close(a, b)
    # Evaluation of the published package forgets the output bias of the leaves.
    without_bias = reference.tree(x, *weights[:-1])
    assert_close(without_bias.output, layer.eval()(x))


def test_leak_equals_published():
    depth, probability = 4, 0.3
    layer, weights = published(depth, region_leak=probability)
    x = torch.randn(9, 12)
    torch.manual_seed(5)
    expected = layer(x)
    torch.manual_seed(5)
    draws = [torch.empty(9, 2**level).uniform_(0, 1) for level in range(depth)]
    leak = (torch.cat(draws, 1) < probability).unsqueeze(1)
    assert leak.any()
    assert_close(reference.soft_tree(x, *weights, leak=leak).output, expected)


CASES = [
    {},
    {"levels": 0},
    {"trees": 3, "levels": 2, "tie_right": False},
    {"node_output": True, "node_activation": "silu", "noise": True, "leaf_scale": True},
    {"leaf_width": None, "trees": 2, "node_activation": "gelu", "noise": True},
    {"leaf_width": None, "levels": 1, "node_bias": False},
    {"node_bias": False, "b1": False, "b2": False, "leaf_activation": "gelu_tanh"},
]


@pytest.mark.parametrize("options", CASES)
def test_tree_equals_walk(options):
    case = make_case(**options)
    for actual, expected in zip(case.run(reference.tree), case.run(walk), strict=True):
        assert_close(actual, expected, torch.float64)


def test_soft_tree_equals_recursion():
    """out(node) = c * out(right) + (1 - c) * out(left), literally."""
    case = make_case(trees=2, node_output=True, node_activation="silu")
    x, node_weight, node_bias, node_output, w1, b1, w2, b2 = case.inputs.values()
    leak = torch.rand(7, 2, 7) < 0.5

    def subtree(t, k, node):
        if node >= 7:
            row = 8 * k + node - 7
            return (w1[row] @ x[t] + b1[row]).relu() @ w2[row] + b2[row]
        row = 7 * k + node
        score = x[t] @ node_weight[row] + node_bias[row]
        c = torch.sigmoid(score)
        c = 1 - c if leak[t, k, node] else c
        mixed = c * subtree(t, k, 2 * node + 2) + (1 - c) * subtree(t, k, 2 * node + 1)
        return mixed + nn.functional.silu(score) * node_output[row]

    expected = torch.stack([subtree(t, 0, 0) + subtree(t, 1, 0) for t in range(7)])
    assert_close(case.run(lambda **kw: reference.soft_tree(**kw, leak=leak)).output, expected)


def test_node_reach_is_sum_of_leaves_below():
    mixture = torch.rand(5, 8, dtype=torch.float64)
    reach = reference.node_reach(mixture)
    below = [(0, 8), (0, 4), (4, 8), (0, 2), (2, 4), (4, 6), (6, 8)]
    for node, (first, last) in enumerate(below):
        assert_close(reach[:, node], mixture[:, first:last].sum(1))
    assert reference.node_reach(torch.rand(5, 1)).shape == (5, 0)


def subtree_value(case, t, k, node, level):
    """What the subtree below heap node ``node`` adds to the output of token t, descended hard."""
    tensors, options = case.tensors, case.options
    nodes = tensors["node_weight"].shape[0] // options["trees"]
    if node < nodes:
        score, right = score_and_decision(case, t, k, node, level)
        value = subtree_value(case, t, k, 2 * node + 1 + right, level + 1)
        if "node_output" in tensors:
            activation = reference.ACTIVATIONS[options.get("node_activation", "identity")]
            value = value + activation(score) * tensors["node_output"][k * nodes + node]
        return value
    if "w1" not in tensors:
        return torch.zeros_like(tensors["node_output"][0])
    row = k * (nodes + 1) + node - nodes
    hidden = tensors["w1"][row] @ tensors["x"][t] + tensors["b1"][row]
    hidden = reference.ACTIVATIONS[options.get("leaf_activation", "relu")](hidden)
    if "leaf_scale" in tensors:
        hidden = hidden * tensors["leaf_scale"][t, k]
    return hidden @ tensors["w2"][row] + tensors["b2"][row]


def score_and_decision(case, t, k, node, level):
    tensors = case.tensors
    row = k * (tensors["node_weight"].shape[0] // case.options["trees"]) + node
    score = tensors["x"][t] @ tensors["node_weight"][row] + tensors["node_bias"][row]
    noise = tensors["noise"][t, k, level] if "noise" in tensors else 0.0
    return score, bool(score + noise >= 0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"trees": 2, "noise": True, "leaf_scale": True, "leaf_activation": "gelu"},
        {"node_output": True, "node_activation": "silu", "levels": 4},
        {"leaf_width": None, "levels": 4, "trees": 2, "node_activation": "gelu"},
        {"leaf_width": None, "noise": True, "node_activation": "relu"},
    ],
)
@pytest.mark.parametrize("slope", [1.0, 3.0])
def test_straight_through_written_out(options, slope):
    """ds = <g, y_right - y_left> * slope * sigmoid'(slope * s), on top of the other gradients."""
    case = make_case(**options)
    tokens, levels = 7, options.get("levels", 3)
    trees, nodes = case.options["trees"], 2**levels - 1
    g = torch.randn(tokens, 8, dtype=torch.float64)
    g_scores = torch.zeros(tokens, trees, levels, dtype=torch.float64)
    _, plain = case.gradients(reference.tree, g, g_scores)
    case.options |= {"straight_through": True, "slope": slope}
    _, actual = case.gradients(reference.tree, g, g_scores)

    grad_score = torch.zeros(tokens, trees * nodes, dtype=torch.float64)
    for t in range(tokens):
        for k in range(trees):
            node = 0
            for level in range(levels):
                score, right = score_and_decision(case, t, k, node, level)
                y_left = subtree_value(case, t, k, 2 * node + 1, level + 1)
                y_right = subtree_value(case, t, k, 2 * node + 2, level + 1)
                c = torch.sigmoid(slope * score)
                grad_score[t, k * nodes + node] = g[t] @ (y_right - y_left) * slope * c * (1 - c)
                node = 2 * node + 1 + right
    assert grad_score.abs().max() > 1e-3

    x, weight = case.tensors["x"], case.tensors["node_weight"]
    expected = plain | {
        "x": plain["x"] + grad_score @ weight,
        "node_weight": plain["node_weight"] + grad_score.T @ x,
        "node_bias": plain["node_bias"] + grad_score.sum(0),
    }
    for name, gradient in actual.items():
        assert_close(gradient, expected[name], name=name)
