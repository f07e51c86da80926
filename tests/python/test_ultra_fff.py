"""UltraFFF: constructor, parity with the reference, noise, state dicts, bad input.

Parity with the published training layer is in test_published.py.
"""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from torch_fff import UltraFFF, reference

EXACT = {"rtol": 1e-11, "atol": 1e-12}


def expected_output(layer, x, **options):
    return reference.tree(
        x,
        layer.node_weights,
        layer.node_biases,
        layer.node_outputs,
        trees=layer.parallel_size,
        tie_right=False,
        node_activation=layer.activation,
        **options,
    ).output


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("input_width", 0, "an integer >= 1"),
        ("output_width", "wide", "an integer >= 1"),
        ("depth", -1, "an integer >= 0"),
        ("parallel_size", 0, "an integer >= 1"),
        ("activation", nn.Sigmoid(), "nn.GELU(approximate='tanh')"),
        ("routing_gradient", True, "'straight_through', 'none'"),
        ("slope", -1.0, "a number"),
        ("noise", -0.5, "a number in [0, inf]"),
        ("alternates", 0, "an integer >= 1"),
        ("min_slope", 2.0, "a number in [0, 1]"),
    ],
)
def test_wrong_argument(argument, value, expected):
    arguments = {"input_width": 4, "output_width": 2, "depth": 2, argument: value}
    with pytest.raises(ValueError, match=f"UltraFFF: {argument}: expected") as error:
        UltraFFF(**arguments)
    assert expected in str(error.value)
    assert f"got {value!r}" in str(error.value)


def test_shapes_of_parameters():
    layer = UltraFFF(7, 5, 2, parallel_size=3, dtype=torch.float64)
    assert layer.n_nodes == 7
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "node_weights": (21, 7),
        "node_biases": (21,),
        "node_outputs": (21, 5),
    }
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert UltraFFF(7, 5, 2, bias=False).node_biases is None
    assert UltraFFF(7, 5, 2, device="meta").node_weights.is_meta


def test_initial_weights_fill_their_published_range():
    torch.manual_seed(0)
    layer = UltraFFF(16, 100, 6, parallel_size=2)
    before = layer.node_weights.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.node_weights, before)
    for weight, fan_in in (
        (layer.node_weights, 16),
        (layer.node_biases, 16),
        (layer.node_outputs, 2 * 7),
    ):
        bound = fan_in**-0.5
        assert 0.9 * bound < weight.max() <= bound
        assert -bound <= weight.min() < -0.9 * bound


def test_repr_shows_what_is_not_default():
    assert repr(UltraFFF(4, 2, 5)) == "UltraFFF(4, 2, 5, parallel_size=1, activation='gelu')"
    options = {"routing_gradient": "straight_through", "alternates": 2}
    layer = UltraFFF(4, 2, 5, 3, "silu", bias=False, output_bias=True, **options)
    assert repr(layer) == (
        "UltraFFF(4, 2, 5, parallel_size=3, activation='silu', bias=False, output_bias=True, "
        "routing_gradient='straight_through', alternates=2)"
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("straight_through", [False, True])
@pytest.mark.parametrize(("depth", "trees", "bias"), [(0, 2, True), (3, 1, False), (3, 3, True)])
def test_output_and_gradients_are_the_reference_s(depth, trees, bias, straight_through, training):
    torch.manual_seed(depth)
    layer = UltraFFF(
        6,
        4,
        depth,
        trees,
        bias=bias,
        routing_gradient="straight_through" if straight_through else "none",
        slope=2.0,
        dtype=torch.float64,
    ).train(training)
    x = torch.randn(2, 15, 6, dtype=torch.float64, requires_grad=True)
    expected = expected_output(layer, x, straight_through=straight_through, slope=2.0)
    actual = layer(x)
    torch.testing.assert_close(actual, expected, **EXACT)
    inputs = [x, *layer.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(actual.sin().sum(), inputs),
        torch.autograd.grad(expected.sin().sum(), inputs),
        **EXACT,
    )


def test_output_bias_is_added_to_the_sum_of_the_trees():
    plain = UltraFFF(6, 4, 2, 3, dtype=torch.float64)
    layer = UltraFFF(6, 4, 2, 3, output_bias=True, dtype=torch.float64)
    assert not layer.output_bias.any()
    layer.load_state_dict(plain.state_dict() | {"output_bias": torch.randn(4)})
    x = torch.randn(5, 3, 6, dtype=torch.float64)
    y = layer(x)
    torch.testing.assert_close(y, plain(x) + layer.output_bias, **EXACT)
    g = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, layer.output_bias, g)[0], g.flatten(0, 1).sum(0), **EXACT
    )
    layer.reset_parameters()
    assert not layer.output_bias.any()


def test_output_bias_has_no_published_form():
    layer = UltraFFF(4, 5, 2, output_bias=True)
    with pytest.raises(ValueError, match=r"published_state_dict: output_bias: expected False"):
        layer.published_state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*output_bias"):
        layer.load_state_dict(UltraFFF(4, 5, 2).published_state_dict())


def test_a_score_of_zero_goes_left():
    layer = UltraFFF(2, 3, 1, activation="identity")
    layer.node_weights.data.zero_()
    layer.node_biases.data.copy_(torch.tensor([0.0, 1.0, 1.0]))
    torch.testing.assert_close(layer(torch.randn(2)), layer.node_outputs[1])


def test_noise_samples_the_soft_decision_only_in_training():
    torch.manual_seed(0)
    layer = UltraFFF(2, 2, 1, activation="identity", noise=1.0, slope=2.0)
    layer.node_weights.data.zero_()
    layer.node_biases.data.copy_(torch.tensor([0.3, 1.0, 1.0]))
    layer.node_outputs.data.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    share = layer(torch.zeros(40000, 2)).mean(0)
    right = 1 / (1 + math.exp(-2 * 0.3))
    assert share.tolist() == pytest.approx([1 - right, right], abs=0.01)
    assert layer.eval()(torch.zeros(100, 2)).mean(0).tolist() == [0, 1]


@pytest.mark.parametrize("shape", [(4,), (1, 4), (3, 2, 4), (2, 0, 4), (0, 4)])
def test_leading_dimensions(shape):
    layer = UltraFFF(4, 5, 2, noise=0.5, routing_gradient="straight_through")
    y = layer(torch.randn(shape))
    assert y.shape == (*shape[:-1], 5)
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("output_bias", [False, True])
def test_autocast(output_bias, device):
    layer = UltraFFF(8, 8, 2, output_bias=output_bias).eval()
    if output_bias:
        layer.output_bias.data.normal_()
    x = torch.randn(20, 8)
    with torch.autocast(device.type, torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    twin = copy.deepcopy(layer).bfloat16()
    torch.testing.assert_close(y, twin(x.bfloat16()))


def test_parametrised_weights():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer = UltraFFF(4, 5, 2)
    plain = copy.deepcopy(layer)
    plain.node_outputs.data *= 2
    parametrize.register_parametrization(layer, "node_outputs", Doubled())
    x = torch.randn(6, 4)
    torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied):
    layer = UltraFFF(4, 5, 2, 2, bias=False)
    x = torch.randn(6, 4)
    torch.testing.assert_close(copied(layer)(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("assign", [True, False])
def test_state_dict_round_trip_inside_a_model(assign, published, bias):
    a, b = (UltraFFF(4, 5, 2, 2, bias=bias) for _ in range(2))
    state = a.published_state_dict() if published else a.state_dict()
    if published:
        names = {"linear_in.weight", "linear_out.weight"} | ({"linear_in.bias"} if bias else set())
        assert state.keys() == names
        assert state["linear_out.weight"].shape == (5, 14)
    model = nn.Sequential(nn.Identity(), nn.Sequential(b))
    state = {f"1.0.{name}": tensor for name, tensor in state.items()}
    model.load_state_dict(state, assign=assign)
    torch.testing.assert_close(b.state_dict(), a.state_dict(), rtol=0, atol=0)
    assert all(p.is_contiguous() for p in b.parameters())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"depth": 3},
            r"nodes \(parallel_size \* \(2\*\*\(depth \+ 1\) - 1\)\): expected 7, .* 15",
        ),
        ({"parallel_size": 2}, "expected 7, the checkpoint has 14"),
        ({"input_width": 6}, "UltraFFF: input_width: expected 4, the checkpoint has 6"),
        ({"output_width": 1}, "UltraFFF: output_width: expected 5, the checkpoint has 1"),
        ({"bias": False}, r"Missing key\(s\).*node_biases"),
    ],
)
@pytest.mark.parametrize("published", [False, True])
def test_checkpoint_of_another_layer(other, message, published):
    arguments = {"input_width": 4, "output_width": 5, "depth": 2}
    layer, other = UltraFFF(**arguments), UltraFFF(**(arguments | other))
    state = other.published_state_dict() if published else other.state_dict()
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)


def test_truncated_checkpoint():
    layer = UltraFFF(4, 5, 2)
    state = layer.published_state_dict()
    del state["linear_out.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*node_outputs"):
        layer.load_state_dict(state)
    state["linear_out.weight"] = layer.node_outputs.T[:, :5]
    with pytest.raises(RuntimeError, match="expected 7, the checkpoint has 5"):
        layer.load_state_dict(state)


@pytest.mark.parametrize(
    ("x", "got"),
    [
        (torch.zeros(6, 3), "3"),
        (torch.tensor(1.0), "scalar"),
        (torch.zeros(6, 4, dtype=torch.int64), "Long"),
        (torch.zeros(6, 4, dtype=torch.float64), "Float"),
    ],
    ids=["width", "0-d", "integer", "dtype mix"],
)
def test_bad_input(device, x, got):
    with pytest.raises((RuntimeError, ValueError), match=r"fff::tree: .* must .*got") as error:
        UltraFFF(4, 5, 2)(x.to(device))
    assert error.match(got)


def test_nan_stays_in_its_token():
    layer = UltraFFF(4, 5, 2)
    x = torch.randn(6, 4)
    expected = layer(x)
    x[2] = math.nan
    y = layer(x)
    assert y[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    torch.testing.assert_close(y[others], expected[others])
