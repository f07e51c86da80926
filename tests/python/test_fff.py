"""FFF: constructor, modes, randomness in training, usage, own losses, state dicts, bad input."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from torch_fff import FFF, hardening_loss, reference
from torch_fff.losses import leaf_balance_loss, node_balance_loss

# float64 through the library against float64 through dense torch
EXACT = {"rtol": 1e-11, "atol": 1e-12}


def tree_arguments(layer):
    names = ("node_weights", "node_biases", "node_outputs", "w1", "b1", "w2", "b2")
    weights = [getattr(layer, name) for name in names]
    options = {
        "trees": layer.parallel_size,
        "node_activation": layer.node_activation,
        "leaf_activation": layer.activation,
    }
    return weights, options


def all_gradients(layer, loss):
    layer.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in layer.named_parameters()}


# ---- constructor --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("input_width", 0, "an integer >= 1"),
        ("leaf_width", -3, "an integer >= 1"),
        ("output_width", 2.5, "an integer >= 1"),
        ("depth", -1, "an integer >= 0"),
        ("depth", True, "an integer >= 0"),
        ("activation", nn.Tanh(), "nn.ReLU()"),
        ("activation", "tanh", "'relu'"),
        ("node_activation", nn.ReLU6(), "nn.ReLU()"),
        ("dropout", 1.5, "a number in [0, 1]"),
        ("region_leak", -0.1, "a number in [0, 1]"),
        ("usage_mode", "often", "'none', 'soft', 'hard'"),
        ("parallel_size", 0, "an integer >= 1"),
        ("routing_gradient", "soft", "'straight_through', 'none'"),
        ("slope", 0.0, "a number > 0"),
        ("noise", math.nan, "a number in [0, inf]"),
        ("alternates", 1.5, "an integer >= 1"),
        ("min_slope", -0.1, "a number in [0, 1]"),
        ("hardening", -1.0, "a number in [0, inf]"),
        ("balance", "much", "a number in [0, inf]"),
        ("master_leaf_width", -1, "an integer >= 0"),
    ],
)
def test_wrong_argument(argument, value, expected):
    arguments = {"input_width": 4, "leaf_width": 3, "output_width": 2, "depth": 2, argument: value}
    with pytest.raises(ValueError, match=f"FFF: {argument}: expected") as error:
        FFF(**arguments)
    assert expected in str(error.value)
    assert f"got {value!r}" in str(error.value)


def test_hard_training_refuses_a_leak_above_one_half():
    with pytest.raises(ValueError, match=r"FFF: region_leak: expected a number in \[0, 0.5\]"):
        FFF(4, 3, 2, 2, train_hardened=True, region_leak=0.6)
    layer = FFF(4, 3, 2, 2, region_leak=0.6)
    with pytest.raises(ValueError, match=r"FFF: region_leak: expected a number in \[0, 0.5\]"):
        layer(torch.randn(5, 4), use_hard_decisions=True)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.ReLU(), "relu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.SiLU(), "silu"),
        (nn.Identity(), "identity"),
    ],
)
def test_activation_modules(module, name):
    torch.manual_seed(0)
    layer = FFF(4, 3, 2, 0, module)
    assert layer.activation == name
    assert layer.node_activation == name
    x = torch.randn(6, 4)
    expected = module(x @ layer.w1[0].T + layer.b1[0]) @ layer.w2[0] + layer.b2[0]
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.eval()(x), expected)


def test_shapes_of_parameters_and_buffers():
    options = {"parallel_size": 3, "node_output": True, "master_leaf_width": 8}
    layer = FFF(7, 2, 5, 3, usage_mode="hard", **options, dtype=torch.float64)
    assert {name: tuple(t.shape) for name, t in layer.state_dict().items()} == {
        "node_weights": (21, 7),
        "node_biases": (21,),
        "node_outputs": (21, 5),
        "w1": (24, 2, 7),
        "b1": (24, 2),
        "w2": (24, 2, 5),
        "b2": (24, 5),
        "master_w1": (8, 7),
        "master_b1": (8,),
        "master_w2": (8, 5),
        "master_b2": (5,),
        "master_logit": (),
        "node_usage": (21,),
        "leaf_usage": (24,),
    }
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert {b.dtype for b in layer.buffers()} == {torch.float32}
    assert FFF(7, 2, 5, 3, device="meta").w1.is_meta


def test_initial_weights_fill_their_published_range():
    torch.manual_seed(0)
    layer = FFF(16, 4, 100, 6, parallel_size=2, node_output=True, usage_mode="hard")
    layer.leaf_usage.fill_(3)
    before = layer.w1.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.w1, before)
    assert layer.leaf_usage.sum() == 0
    for name, fan_in in {
        "node_weights": 16,
        "node_biases": 16,
        "w1": 16,
        "b1": 16,
        "w2": 2 * 4,
        "b2": 2 * 4,
        "node_outputs": 2 * (6 + 4),
    }.items():
        bound, weight = fan_in**-0.5, getattr(layer, name)
        assert 0.9 * bound < weight.max() <= bound
        assert -bound <= weight.min() < -0.9 * bound


def test_repr_shows_what_is_not_default():
    assert repr(FFF(4, 3, 2, 5)) == "FFF(4, 3, 2, 5, activation='relu')"
    layer = FFF(4, 3, 2, 5, nn.SiLU(), 0.1, node_output=True, hardening=3)
    assert repr(layer) == (
        "FFF(4, 3, 2, 5, activation='silu', dropout=0.1, hardening=3.0, "
        "node_output=True, node_activation='silu')"
    )


# ---- forward ------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1, 3])
@pytest.mark.parametrize("trees", [1, 3])
@pytest.mark.parametrize("node_output", [False, True])
def test_modes_compute_what_the_reference_does(depth, trees, node_output):
    torch.manual_seed(depth)
    options = {"node_output": node_output, "node_activation": "identity", "dtype": torch.float64}
    layer = FFF(6, 3, 4, depth, nn.GELU(), parallel_size=trees, **options)
    weights, options = tree_arguments(layer)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    soft = reference.soft_tree(x, *weights, **options).output
    hard = reference.tree(x, *weights, **options, straight_through=True)
    for training, use_hard, expected in (
        (True, None, soft),
        (True, False, soft),
        (True, True, hard.output),
        (False, None, hard.output),
        (False, True, hard.output),
        (False, False, soft),
    ):
        layer.train(training)
        torch.testing.assert_close(layer(x, use_hard_decisions=use_hard), expected, **EXACT)
    layer.train_hardened = True
    layer.train()
    torch.testing.assert_close(layer(x, use_hard_decisions=False), hard.output, **EXACT)


@pytest.mark.parametrize("slope", [1.0, 3.0])
def test_straight_through_gradient_is_the_reference_s(slope):
    torch.manual_seed(0)
    options = {"parallel_size": 2, "node_output": True, "slope": slope, "dtype": torch.float64}
    layer = FFF(6, 3, 4, 3, train_hardened=True, **options)
    weights, options = tree_arguments(layer)
    x = torch.randn(30, 6, dtype=torch.float64)
    actual = all_gradients(layer, layer(x).sin().sum())
    expected = reference.tree(x, *weights, **options, straight_through=True, slope=slope).output
    torch.testing.assert_close(actual, all_gradients(layer, expected.sin().sum()), **EXACT)
    layer.routing_gradient = "none"
    unrouted = all_gradients(layer, layer(x).sin().sum())
    assert not torch.allclose(unrouted["node_weights"], actual["node_weights"])


@pytest.mark.parametrize("shape", [(4,), (1, 4), (3, 2, 4), (2, 0, 4), (0, 4)])
@pytest.mark.parametrize("hard", [False, True])
def test_leading_dimensions(shape, hard):
    options = {"dropout": 0.1, "region_leak": 0.1, "noise": 0.5, "hardening": 0.1, "balance": 0.1}
    layer = FFF(4, 3, 5, 2, train_hardened=hard, usage_mode="hard", **options, master_leaf_width=2)
    y, entropies = layer(torch.randn(shape), return_entropies=True)
    assert y.shape == (*shape[:-1], 5)
    assert entropies.shape == (3,)
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert entropies.isfinite().all()
    assert layer.eval()(torch.randn(shape)).shape == y.shape


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("hard", [False, True])
def test_entropies_are_token_means_over_all_nodes(training, hard):
    torch.manual_seed(0)
    layer = FFF(4, 3, 5, 2, parallel_size=2).train(training)
    x = torch.randn(3, 7, 4)
    _, entropies = layer(x, return_entropies=True, use_hard_decisions=hard)
    c = torch.sigmoid(x @ layer.node_weights.T + layer.node_biases).flatten(0, 1)
    expected = -(c * c.log() + (1 - c) * (1 - c).log()).mean(0)
    torch.testing.assert_close(entropies, expected)


def test_hard_entropies_are_finite_in_low_precision():
    layer = FFF(4, 3, 5, 2, dtype=torch.bfloat16)
    x = 1000 * torch.randn(7, 4, dtype=torch.bfloat16)
    _, entropies = layer(x, return_entropies=True)
    assert entropies.dtype == torch.float32
    assert entropies.isfinite().all()


def test_master_leaf():
    torch.manual_seed(0)
    layer = FFF(4, 3, 5, 2, nn.SiLU(), master_leaf_width=6)
    assert layer.master_logit == 0.5
    x = torch.randn(9, 4)
    weights, options = tree_arguments(layer)
    hidden = nn.functional.silu(x @ layer.master_w1.T + layer.master_b1)
    master = hidden @ layer.master_w2 + layer.master_b2
    share = torch.sigmoid(torch.tensor(0.5))
    for hard, tree in ((False, reference.soft_tree), (True, reference.tree)):
        expected = share * tree(x, *weights, **options).output + (1 - share) * master
        torch.testing.assert_close(layer(x, use_hard_decisions=hard), expected)


def test_parametrised_weights():
    """A shared base, as in the training recipe: w1 is then no parameter but an attribute."""

    class SharedBase(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Parameter(torch.ones(3, 4))

        def forward(self, delta):
            return self.base + delta

    layer = FFF(4, 3, 5, 2).eval()
    plain = copy.deepcopy(layer)
    plain.w1.data += 1
    parametrize.register_parametrization(layer, "w1", SharedBase())
    x = torch.randn(6, 4)
    torch.testing.assert_close(layer(x), plain(x))
    layer(x).sum().backward()
    assert layer.parametrizations.w1[0].base.grad.abs().sum() > 0


# ---- randomness in training ---------------------------------------------------------------------


def test_noise_samples_the_soft_decision():
    """Logistic noise of scale 1 sends a token right with probability sigmoid(slope * score)."""
    torch.manual_seed(0)
    layer = FFF(2, 1, 1, 1, train_hardened=True, noise=1.0, slope=2.0, usage_mode="hard")
    x = torch.tensor([0.7, -0.2])
    layer(x.expand(40000, 2))
    score = x @ layer.node_weights[0] + layer.node_biases[0]
    expected = torch.sigmoid(2 * score).item()
    assert layer.leaf_usage[1].item() / 40000 == pytest.approx(expected, abs=0.01)
    layer.noise = 0.0
    layer.reset_parameters()
    layer(x.expand(100, 2))
    assert sorted(layer.leaf_usage.tolist()) == [0, 100]


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("leak", [0.1, 0.5])
def test_region_leak_flips_decisions_with_its_probability(hard, leak):
    torch.manual_seed(0)
    layer = FFF(2, 1, 1, 2, region_leak=leak, usage_mode="soft")
    layer.node_weights.data.zero_()
    layer.node_biases.data.fill_(100.0)  # as hard as can be: right
    layer(torch.zeros(40000, 2), use_hard_decisions=hard)
    share = (layer.leaf_usage / 40000).tolist()
    left, right = leak, 1 - leak
    expected = [left * left, left * right, right * left, right * right]
    assert share == pytest.approx(expected, abs=0.01)
    assert layer.node_usage[0] == 40000
    before = layer.leaf_usage.clone()
    layer.eval()(torch.zeros(10, 2))
    assert torch.equal(layer.leaf_usage, before)


@pytest.mark.parametrize("hard", [False, True])
def test_dropout_drops_hidden_activations_only_in_training(hard):
    torch.manual_seed(0)
    layer = FFF(4, 2, 1, 0, dropout=0.25)
    layer.w1.data.zero_()
    layer.b1.data.fill_(1.0)
    layer.w2.data.fill_(1.0)
    layer.b2.data.fill_(10.0)
    x = torch.zeros(20000, 4)
    y = layer(x, use_hard_decisions=hard) - 10
    kept, counts = y.div(4 / 3).round().unique(return_counts=True)
    assert kept.tolist() == [0, 1, 2]
    assert (counts / 20000).tolist() == pytest.approx([1 / 16, 6 / 16, 9 / 16], abs=0.015)
    assert (layer.eval()(x, use_hard_decisions=hard) == 12).all()


# ---- usage --------------------------------------------------------------------------------------


@pytest.mark.parametrize("trees", [1, 2])
@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("usage_mode", ["soft", "hard"])
def test_usage(usage_mode, hard, trees):
    torch.manual_seed(0)
    layer = FFF(4, 2, 3, 3, usage_mode=usage_mode, parallel_size=trees, train_hardened=hard)
    weights, options = tree_arguments(layer)
    batches = torch.randn(3, 2, 11, 4)
    mixture = reference.soft_tree(batches, *weights, **options).mixture
    if hard or usage_mode == "hard":
        leaf = reference.tree(batches, *weights, **options).leaf
        mixture = nn.functional.one_hot(leaf, 8).float()
    for x in batches:
        layer(x)
        layer.eval()(x)
        layer.train()
    expected = mixture.flatten(0, 2)
    torch.testing.assert_close(layer.leaf_usage, expected.sum(0).flatten())
    torch.testing.assert_close(layer.node_usage, reference.node_reach(expected).sum(0).flatten())


def test_usage_is_in_groups_and_state_only_when_tracked():
    tracked, untracked = FFF(4, 2, 3, 2, usage_mode="hard"), FFF(4, 2, 3, 2, node_output=True)
    assert tracked.get_leaf_param_group()["usage"] is tracked.leaf_usage
    assert tracked.get_node_param_group()["usage"] is tracked.node_usage
    assert "leaf_usage" in tracked.state_dict()
    assert "leaf_usage" not in untracked.state_dict()
    groups = untracked.get_node_param_group(), untracked.get_leaf_param_group()
    assert [list(group) for group in groups] == [["params"], ["params"]]
    assert {p for group in groups for p in group["params"]} == set(untracked.parameters())


# ---- losses that the layer adds by itself -------------------------------------------------------


@pytest.mark.parametrize("hard", [False, True])
def test_hardening_equals_the_explicit_loss(hard):
    torch.manual_seed(0)
    layer = FFF(4, 3, 5, 3, train_hardened=hard, parallel_size=2, dtype=torch.float64)
    x = torch.randn(2, 11, 4, dtype=torch.float64)
    y, entropies = layer(x, return_entropies=True)
    expected = all_gradients(layer, y.sin().sum() + 0.3 * entropies.sum())
    layer.hardening = 0.3
    y = layer(x)
    torch.testing.assert_close(all_gradients(layer, y.sin().sum()), expected, **EXACT)
    torch.testing.assert_close(layer.entropy, entropies.sum().detach(), **EXACT)
    if not hard:
        layer.hardening = 0.0
        y = layer(x)
        explicit = all_gradients(layer, y.sin().sum() + 0.3 * hardening_loss(layer))
        torch.testing.assert_close(explicit, expected, **EXACT)


@pytest.mark.parametrize("hard", [False, True])
def test_balance_equals_the_explicit_loss(hard):
    torch.manual_seed(0)
    options = {"parallel_size": 2, "slope": 2.0, "dtype": torch.float64}
    layer = FFF(4, 3, 5, 3, train_hardened=hard, **options)
    weights, options = tree_arguments(layer)
    x = torch.randn(2, 11, 4, dtype=torch.float64)
    if hard:
        y, scores, leaf = reference.tree(x, *weights, **options, straight_through=True, slope=2.0)
        balance = node_balance_loss(scores, leaf, 2.0)
    else:
        y, _, mixture = reference.soft_tree(x, *weights, **options)
        balance = leaf_balance_loss(mixture)
    expected = all_gradients(layer, y.sin().sum() + 0.7 * balance)
    layer.balance = 0.7
    torch.testing.assert_close(all_gradients(layer, layer(x).sin().sum()), expected, **EXACT)
    torch.testing.assert_close(layer.balance_loss, balance.detach(), **EXACT)


def test_output_with_own_losses_may_be_changed_in_place():
    layer = FFF(4, 3, 5, 2, hardening=0.3, balance=0.1)
    x = torch.randn(6, 4)
    expected = all_gradients(layer, (layer(x) + 1).relu().sum())
    y = layer(x)
    y += 1
    torch.testing.assert_close(all_gradients(layer, y.relu_().sum()), expected)


@pytest.mark.parametrize("own_loss", ["hardening", "balance"])
def test_own_losses_refuse_float16(device, own_loss):
    message = "FFF: hardening and balance: expected .* got float16"
    layer = FFF(4, 3, 5, 2, **{own_loss: 0.1})
    x = torch.randn(6, 4)
    with torch.autocast(device.type, torch.float16), pytest.raises(RuntimeError, match=message):
        layer(x)
    with torch.autocast(device.type, torch.bfloat16):
        layer(x).sum().backward()
    with pytest.raises(RuntimeError, match=message):
        layer.half()(x.half())
    with torch.no_grad():  # a loss without gradient is harmless
        layer(x.half())
    layer.eval()(x.half())


def test_training_forward_without_gradients_still_logs_the_entropy():
    layer = FFF(4, 3, 5, 2, hardening=0.1)
    with torch.no_grad():
        layer(torch.zeros(6, 4))
    assert 0 < layer.entropy < 3 * math.log(2)
    assert not layer.entropy.requires_grad


# ---- copies and state dicts ---------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_after_a_training_forward(copied):
    layer = FFF(4, 3, 5, 2, usage_mode="hard", hardening=0.1)
    x = torch.randn(6, 4)
    y = layer(x)
    twin = copied(layer)
    torch.testing.assert_close(twin.state_dict(), layer.state_dict())
    torch.testing.assert_close(twin.entropy, layer.entropy)
    torch.testing.assert_close(twin(x), y)
    with pytest.raises(RuntimeError, match="got none"):
        hardening_loss(copied(layer))


@pytest.mark.parametrize("assign", [False, True])
def test_own_state_dict_round_trip(assign):
    options = {"parallel_size": 2, "node_output": True, "master_leaf_width": 3}
    a, b = (FFF(4, 3, 5, 2, usage_mode="soft", **options) for _ in range(2))
    a(torch.randn(6, 4))
    result = b.load_state_dict(a.state_dict(), assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    torch.testing.assert_close(b.state_dict(), a.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("master", [0, 8])
def test_published_state_dict_round_trip_inside_a_model(master):
    options = {"usage_mode": "soft", "master_leaf_width": master}
    a = FFF(4, 3, 5, 2, **options)
    a(torch.randn(6, 4))
    published = a.published_state_dict()
    expected = {"depth", "node_weights", "node_biases", "w1s", "b1s", "w2s", "b2s"}
    expected |= {"node_usage", "leaf_usage"}
    if master:
        expected |= {"magic_w1", "magic_b1", "magic_w2", "magic_b2", "k"}
        assert published["magic_w1"].shape == (1, 4, 8)
        assert published["magic_b2"].shape == (1, 5)
    assert published.keys() == expected
    assert published["depth"] == 2
    assert published["w1s"].shape == (4, 4, 3)
    assert published["node_biases"].shape == (3, 1)

    published["f"] = torch.zeros(4)
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(FFF(4, 3, 5, 2, **options)))
    state = model[0].state_dict(prefix="0.")
    state |= {f"1.0.{name}": tensor for name, tensor in published.items()}
    model.load_state_dict(state)
    torch.testing.assert_close(model[1][0].state_dict(), a.state_dict(), rtol=0, atol=0)
    assert all(p.is_contiguous() for p in model.parameters())


def test_published_usage_is_dropped_where_it_is_not_tracked():
    a, b = FFF(4, 3, 5, 2, usage_mode="soft"), FFF(4, 3, 5, 2)
    b.load_state_dict(a.published_state_dict())
    b.load_state_dict(a.state_dict())
    assert torch.equal(b.w1, a.w1)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"depth": 3}, r"leaves \(parallel_size \* 2\*\*depth\): expected 4, the checkpoint has 8"),
        ({"leaf_width": 4}, "FFF: leaf_width: expected 3, the checkpoint has 4"),
        ({"input_width": 6}, "FFF: input_width: expected 4, the checkpoint has 6"),
        ({"output_width": 1}, "FFF: output_width: expected 5, the checkpoint has 1"),
        ({"master_leaf_width": 8}, "construct the layer with master_leaf_width=8"),
    ],
)
@pytest.mark.parametrize("published", [False, True])
def test_checkpoint_of_another_layer(other, message, published):
    arguments = {"input_width": 4, "leaf_width": 3, "output_width": 5, "depth": 2}
    layer, other = FFF(**arguments), FFF(**(arguments | other))
    state = other.published_state_dict() if published else other.state_dict()
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)


@pytest.mark.parametrize("damage", ["missing", "no tensor", "flat", "cut"])
def test_truncated_checkpoint(damage):
    layer = FFF(4, 3, 5, 2)
    state = dict(layer.published_state_dict())
    if damage == "missing":
        del state["w2s"]
        message = r"Missing key\(s\).*w2"
    elif damage == "no tensor":
        state["w1s"] = "lost"
        message = "w1"
    elif damage == "flat":
        state["w1s"] = state["w1s"].flatten()
        message = "w1"
    else:
        state["w1s"] = state["w1s"][:3]
        message = "expected 4, the checkpoint has 3"
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)


def test_unknown_keys_stay_unexpected():
    layer = FFF(4, 3, 5, 2)
    state = layer.published_state_dict() | {"w3s": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*w3s"):
        layer.load_state_dict(state)
    result = layer.load_state_dict(state, strict=False)
    assert result.unexpected_keys == ["w3s"]


@pytest.mark.parametrize("option", [{"parallel_size": 2}, {"node_output": True}])
def test_what_has_no_published_form(option):
    layer = FFF(4, 3, 5, 2, **option)
    with pytest.raises(ValueError, match=f"published_state_dict: {next(iter(option))}: expected"):
        layer.published_state_dict()


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize(
    ("x", "got"),
    [
        (torch.zeros(6, 3), "3"),
        (torch.tensor(1.0), r"\[\]|scalar"),
        (torch.zeros(6, 4, dtype=torch.int64), "int64|Long"),
        (torch.zeros(6, 4, dtype=torch.float64), "float|Float"),
    ],
    ids=["width", "0-d", "integer", "dtype mix"],
)
def test_bad_input(device, x, got, hard):
    with pytest.raises((RuntimeError, ValueError), match=r"tree: .*(expected|must).*got") as error:
        FFF(4, 3, 5, 2)(x.to(device), use_hard_decisions=hard)
    assert error.match(got)


def test_device_mix(device):
    message = f"node_weight: expected device meta, got .*{device.type}"
    with pytest.raises(ValueError, match=message):
        FFF(4, 3, 5, 2)(torch.zeros(6, 4, device="meta"))


@pytest.mark.parametrize("hard", [False, True])
def test_nan_stays_in_its_token(hard):
    layer = FFF(4, 3, 5, 2)
    x = torch.randn(6, 4)
    expected = layer(x, use_hard_decisions=hard)
    x[2] = math.nan
    y = layer(x, use_hard_decisions=hard)
    assert y[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(y[others], expected[others])


@pytest.mark.parametrize("hard", [False, True])
def test_non_contiguous_input_and_weights(hard):
    layer = FFF(4, 3, 5, 2)
    x = torch.randn(4, 6).T
    expected = layer(x.contiguous(), use_hard_decisions=hard)
    layer.w1.data = layer.w1.data.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(layer(x, use_hard_decisions=hard), expected)
