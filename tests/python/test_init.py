"""torch_fff.init: median splits of data, and trained dense blocks as a start."""

import copy

import pytest
import torch
from torch import nn

from torch_fff import FFF, UltraFFF, functional
from torch_fff.init import from_dense_, median_splits_


def make(kind, depth, trees=1, width=6, **options):
    torch.manual_seed(0)
    if kind is FFF:
        return FFF(width, 4, 5, depth, parallel_size=trees, **options)
    return UltraFFF(width, 5, depth, trees, activation="relu", **options)


def leaf_shares(layer, x):
    """Share of the tokens that each leaf gets, [K, leaves]."""
    fff = isinstance(layer, FFF)
    nodes = (layer.node_weights, layer.node_biases)
    leaf = functional.descend(x, *nodes, trees=layer.parallel_size, tie_right=fff)[1]
    leaf = (leaf if fff else leaf // 2).flatten(0, -2)
    shares = [torch.bincount(tree, minlength=2**layer.depth) for tree in leaf.unbind(-1)]
    return torch.stack(shares) / len(leaf)


# ---- median splits ------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["drawn", "principal"])
@pytest.mark.parametrize("trees", [1, 3])
@pytest.mark.parametrize("kind", [FFF, UltraFFF])
def test_every_leaf_gets_its_share(kind, trees, direction):
    layer = make(kind, 4, trees)
    before = copy.deepcopy(layer)
    x = torch.randn(8, 200, 6) @ torch.randn(6, 6) + 3
    assert leaf_shares(layer, x).max() > 0.3
    assert median_splits_(layer, x, direction=direction) is layer
    torch.testing.assert_close(leaf_shares(layer, x), torch.full((trees, 16), 1 / 16))
    decisions = layer.node_weights.unflatten(0, (trees, -1))[:, :15]
    drawn = before.node_weights.unflatten(0, (trees, -1))[:, :15]
    assert torch.equal(decisions, drawn) == (direction == "drawn")
    torch.testing.assert_close(decisions.norm(dim=-1), drawn.norm(dim=-1))
    # Neurons that decide nothing, and leaves, stay.
    for name, parameter in before.named_parameters():
        if not name.startswith("node_"):
            assert torch.equal(getattr(layer, name), parameter)
    if kind is UltraFFF:
        last = layer.node_biases.view(trees, -1)[:, 15:]
        assert torch.equal(last, before.node_biases.view(trees, -1)[:, 15:])


def test_principal_direction_of_each_tree_is_an_axis_of_its_own():
    layer = make(FFF, 2, 3)
    scales = torch.tensor([1.0, 9.0, 0.1, 3.0, 0.1, 0.1])
    median_splits_(layer, torch.randn(4000, 6) * scales, direction="principal")
    roots = layer.node_weights[::3]
    roots = roots / roots.norm(dim=1, keepdim=True)
    torch.testing.assert_close(roots[:, [1, 3, 0]].abs(), torch.eye(3), rtol=0, atol=0.05)


def test_repeated_tokens_are_parted_where_they_differ():
    layer = make(FFF, 1, width=1)
    layer.node_weights.data.fill_(1.0)
    x = torch.tensor([0.0] * 30 + [1.0] * 60 + [2.0] * 10)[:, None]
    median_splits_(layer, x)
    assert layer.node_biases.item() == pytest.approx(-0.5)  # 30 : 70, not 90 : 10
    median_splits_(layer, torch.tensor([[3.0]] * 50))
    assert layer.node_biases.item() == pytest.approx(-0.5)


@pytest.mark.parametrize("direction", ["drawn", "principal"])
def test_nodes_of_few_tokens_stay(direction):
    layer = make(FFF, 4)
    before = copy.deepcopy(layer)
    median_splits_(layer, torch.randn(100, 6), direction=direction, fewest=40)
    changed = (layer.node_biases != before.node_biases).nonzero().flatten().tolist()
    assert changed == [0, 1, 2]
    for tokens in (0, 1):
        median_splits_(layer, torch.randn(tokens, 6), direction=direction)
    changed = (layer.node_biases != before.node_biases).nonzero().flatten().tolist()
    assert changed == [0, 1, 2]


def test_low_precision_layers():
    layer = make(FFF, 3, dtype=torch.bfloat16)
    x = torch.randn(800, 6).bfloat16()
    median_splits_(layer, x)
    torch.testing.assert_close(leaf_shares(layer, x), torch.full((1, 8), 1 / 8), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": nn.ReLU()}, "layer: expected an FFF or UltraFFF"),
        ({"layer": UltraFFF(6, 5, 2, bias=False)}, "layer: expected one with biases"),
        ({"x": torch.randn(3, 5)}, r"x: expected shape \[..., 6\], got \(3, 5\)"),
        ({"x": torch.randn(3, 6).double()}, "x: expected torch.float32 on cpu"),
        ({"x": torch.full((3, 6), torch.nan)}, "x: expected finite tokens"),
        ({"direction": "random"}, "direction: expected one of 'drawn', 'principal'"),
        ({"fewest": 1}, "fewest: expected an integer >= 2"),
        (
            {"layer": FFF(6, 2, 5, 1, parallel_size=7), "direction": "principal"},
            "direction: expected 'drawn' for more trees",
        ),
    ],
)
def test_wrong_arguments_of_median_splits(change, message):
    arguments = {"layer": make(FFF, 2), "x": torch.randn(50, 6)} | change
    with pytest.raises(ValueError, match=f"median_splits_: {message}"):
        median_splits_(**arguments)


# ---- from a dense block -------------------------------------------------------------------------

HIDDEN = 32


def dense_block(width=6):
    """w1, b1, w2, b2, and tokens in clusters."""
    torch.manual_seed(1)
    first, second = nn.Linear(width, HIDDEN), nn.Linear(HIDDEN, 5)
    nn.init.normal_(second.bias, mean=1.0)
    x = 2 * torch.randn(8, width)[torch.randint(8, (2000,))] + 0.3 * torch.randn(2000, width)
    weights = [p.detach() for p in (first.weight, first.bias, second.weight, second.bias)]
    return weights, x


def relative_error(layer, weights, x):
    w1, b1, w2, b2 = weights
    y = nn.functional.linear(nn.functional.linear(x, w1, b1).relu(), w2, b2)
    return ((layer.eval()(x) - y).square().sum() / (y - y.mean(0)).square().sum()).item()


@pytest.mark.parametrize("options", [{}, {"node_output": True, "shared_leaf_base": True}])
@pytest.mark.parametrize(("trees", "bound"), [(1, 0.15), (2, 0.15)])
def test_leaves_start_from_groups_of_neurons(trees, bound, options):
    weights, x = dense_block()
    layer = make(FFF, 3, trees, **options)
    fresh = relative_error(layer, weights, x[:1000])
    assert from_dense_(layer, *weights, x[1000:]) is layer
    assert relative_error(layer, weights, x[:1000]) < min(bound, fresh / 5)
    rows = {tuple(row.tolist()) for row in weights[0]}
    assert all(tuple(row.tolist()) in rows for row in layer.w1.flatten(0, 1))
    if options:
        assert not layer.node_outputs.any()
        assert not layer.base_w1.any()


def test_one_leaf_of_all_neurons_is_the_block():
    weights, x = dense_block()
    layer = FFF(6, HIDDEN, 5, 0)
    from_dense_(layer, *weights, x)
    assert relative_error(layer, weights, x) < 1e-10


@pytest.mark.parametrize("output_bias", [False, True])
@pytest.mark.parametrize(("depth", "trees"), [(0, HIDDEN), (2, 4), (4, 1)])
def test_nodes_take_the_block_s_neurons(depth, trees, output_bias):
    (w1, b1, w2, b2), x = dense_block()
    if not output_bias:
        b2 = torch.zeros_like(b2)
    layer = make(UltraFFF, depth, trees, output_bias=output_bias, noise=3.0)
    fresh = relative_error(layer.eval(), (w1, b1, w2, b2), x)
    from_dense_(layer.train(), w1, b1, w2, b2, x)
    assert layer.training
    rows = [w1.tolist().index(row.tolist()) for row in layer.node_weights]
    assert len(set(rows)) == trees * layer.n_nodes
    torch.testing.assert_close(layer.node_biases, b1[rows], rtol=0, atol=0)
    torch.testing.assert_close(layer.node_outputs, w2.T[rows], rtol=0, atol=0)
    error = relative_error(layer, (w1, b1, w2, b2), x)
    if depth == 0:  # all neurons are visited
        assert error < 1e-10
    elif output_bias:
        assert error < min(1.0, fresh)
        mean = nn.functional.linear(nn.functional.linear(x, w1, b1).relu(), w2, b2).mean(0)
        torch.testing.assert_close(layer(x).mean(0), mean, rtol=1e-3, atol=1e-3)


def test_deciding_neurons_split_the_tokens():
    """The largest neuron is always on: it splits nothing, and is left to the last level."""
    torch.manual_seed(0)
    x = torch.randn(1000, 6)
    w1, w2 = torch.randn(7, 6), torch.randn(5, 7)
    b1 = torch.zeros(7)
    b1[3] = 30.0
    layer = make(UltraFFF, 2)
    from_dense_(layer, w1, b1, w2, None, x)
    assert layer.node_biases.tolist().index(30.0) >= 3
    assert leaf_shares(layer, x).min() > 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w1": torch.randn(HIDDEN, 5)}, r"w1: expected shape \[32, 6\], got \[32, 5\]"),
        ({"b1": torch.randn(3)}, r"b1: expected shape \[32\], got \[3\]"),
        ({"w2": torch.randn(HIDDEN, 5)}, r"w2: expected shape \[5, 32\], got \[32, 5\]"),
        ({"b2": torch.randn(5, device="meta")}, "b2: expected device cpu, got"),
        ({"w1": torch.randn(0, 6), "b1": None, "w2": torch.randn(5, 0)}, "w1: expected at least"),
        ({"x": torch.randn(0, 6)}, "x: expected at least one token"),
        ({"layer": FFF(6, 2, 5, 1, master_leaf_width=2)}, "layer: expected master_leaf_width=0"),
        ({"layer": FFF(6, 2, 5, 1, parallel_size=33)}, "layer: expected parallel_size <= 32"),
        ({"layer": UltraFFF(6, 5, 5)}, "layer: expected at most 32 nodes, as many as neurons, "),
        ({"layer": UltraFFF(6, 5, 2, bias=False)}, r"layer: expected UltraFFF\(bias=True\)"),
    ],
)
def test_wrong_arguments_of_from_dense(change, message):
    (w1, b1, w2, b2), x = dense_block()
    arguments = {"layer": make(FFF, 2), "w1": w1, "b1": b1, "w2": w2, "b2": b2, "x": x} | change
    with pytest.raises(ValueError, match=f"from_dense_: {message}"):
        from_dense_(**arguments)
