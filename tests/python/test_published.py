"""The layers against the published ones: PyPI fastfeedforward, UltraFastBERT's training layer."""

import fastfeedforward
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch_fff import FFF, UltraFFF

pytestmark = pytest.mark.cpu

# What two orders of the same float32 sums differ by at these sizes.
ROUNDING = {"rtol": 2e-5, "atol": 2e-6}

DEPTHS = (0, 1, 2, 4)


def package_and_ours(depth, leaf_width=3, activation=None, **options):
    """The package's layer, and ours with its state dict loaded; both in training mode."""
    torch.manual_seed(depth)
    activation = activation or nn.ReLU()
    arguments = (7, leaf_width, 5, depth, activation)
    package = fastfeedforward.FFF(*arguments, **options)
    ours = FFF(*arguments, **options, routing_gradient="none")
    ours.load_state_dict(package.state_dict())
    return package, ours


def gradients(layer, x, **options):
    """Output, entropies, gradient of x, gradients of the parameters under the published names."""
    x = x.clone().requires_grad_()
    y, entropies = layer(x, return_entropies=True, **options)
    (y.sin().sum() + 3 * entropies.sum()).backward()
    grads = {name: p.grad for name, p in layer.named_parameters()}
    if isinstance(layer, FFF):
        grads["node_biases"] = grads["node_biases"].unsqueeze(1)
        grads["w1s"] = grads.pop("w1").transpose(1, 2)
        grads |= {f"{name}s": grads.pop(name) for name in ("b1", "w2", "b2")}
    # The package leaves out the gradients of what has no elements, or cannot have one.
    grads = {name: grad for name, grad in grads.items() if grad is not None and grad.numel()}
    return y, entropies, x.grad, grads


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU()], ids=["relu", "gelu"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_forward_gradients_and_entropies_equal_the_package(depth, activation, hard):
    package, ours = package_and_ours(depth, activation=activation)
    x = torch.randn(40, 7)
    expected = gradients(package, x, use_hard_decisions=hard)
    actual = gradients(ours, x, use_hard_decisions=hard)
    torch.testing.assert_close(actual, expected, **ROUNDING)


@pytest.mark.parametrize("depth", DEPTHS)
def test_inference_is_the_hard_training_path_of_the_package(depth):
    package, ours = package_and_ours(depth)
    x = torch.randn(64, 7)
    with torch.no_grad():
        expected = package(x, use_hard_decisions=True)
        torch.testing.assert_close(ours.eval()(x), expected, **ROUNDING)


def test_inference_has_the_output_bias_that_the_package_forgets():
    package, ours = package_and_ours(3)
    x = torch.randn(64, 7)
    with torch.no_grad():
        bias = ours.eval()(x) - package.eval()(x)
        distance = (bias.unsqueeze(1) - ours.b2).abs().amax(-1).amin(-1)
    assert distance.max() < 1e-5


@pytest.mark.parametrize("option", ["region_leak", "dropout"])
def test_certain_leak_and_dropout_equal_the_package(option):
    package, ours = package_and_ours(3, **{option: 1.0})
    x = torch.randn(40, 7)
    torch.testing.assert_close(gradients(ours, x), gradients(package, x), **ROUNDING)


@pytest.mark.parametrize("usage_mode", ["soft", "hard"])
def test_leaf_usage_equals_the_package(usage_mode):
    package, ours = package_and_ours(3, usage_mode=usage_mode)
    for x in torch.randn(2, 50, 7):
        for layer in (package, ours):
            layer(x, use_hard_decisions=usage_mode == "hard")
    torch.testing.assert_close(ours.leaf_usage, package.leaf_usage.data, **ROUNDING)
    # The package's node usage is the reach down to the root's children.
    torch.testing.assert_close(ours.node_usage[:3], package.node_usage.data[:3], **ROUNDING)


@pytest.mark.parametrize("usage_mode", ["none", "soft"])
def test_the_package_loads_our_published_state_dict(usage_mode):
    package, ours = package_and_ours(3, usage_mode=usage_mode)
    ours.reset_parameters()
    package.load_state_dict(ours.published_state_dict())
    x = torch.randn(40, 7)
    torch.testing.assert_close(ours(x), package(x), **ROUNDING)


def test_constructor_and_groups_are_those_of_the_package():
    arguments = (6, 4, 5, 2, nn.GELU(), 0.1, True, 0.2, "soft")
    package, ours = fastfeedforward.FFF(*arguments), FFF(*arguments)
    for name in (
        *("input_width", "leaf_width", "output_width", "n_leaves", "n_nodes"),
        *("dropout", "train_hardened", "region_leak", "usage_mode"),
    ):
        assert getattr(ours, name) == getattr(package, name)
    assert ours.depth == package.depth.item()
    for group in ("get_node_param_group", "get_leaf_param_group"):
        actual, expected = getattr(ours, group)(), getattr(package, group)()
        assert actual.keys() == expected.keys()
        assert len(actual["params"]) == len(expected["params"])
        assert actual["usage"].shape == expected["usage"].shape
        # A row of every parameter for each count: what the local optimizers rely on.
        assert {len(p) for p in actual["params"]} == {len(actual["usage"])}


class DenseUltraFFF(nn.Module):
    """UltraFastBERT's layer as it trains: everything computed, all but the paths masked."""

    def __init__(self, input_width, output_width, depth, parallel_size, bias=True):
        super().__init__()
        self.trees, self.levels, self.nodes = parallel_size, depth + 1, 2 ** (depth + 1) - 1
        self.linear_in = nn.Linear(input_width, parallel_size * self.nodes, bias=bias)
        self.linear_out = nn.Linear(parallel_size * self.nodes, output_width, bias=False)

    def forward(self, x):
        scores = self.linear_in(x).unflatten(-1, (self.trees, self.nodes))
        mask = torch.zeros_like(scores)
        node = torch.zeros_like(scores[..., :1], dtype=torch.long)
        for _ in range(self.levels):
            mask.scatter_(-1, node, 1)
            node = 2 * node + 1 + (scores.gather(-1, node) > 0)
        return self.linear_out((F.gelu(scores) * mask).flatten(-2))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("depth", "trees"), [(0, 1), (3, 1), (2, 4), (5, 2)])
def test_ultra_fff_equals_the_published_training_layer(depth, trees, bias):
    torch.manual_seed(depth)
    dense = DenseUltraFFF(9, 6, depth, trees, bias)
    ours = UltraFFF(9, 6, depth, trees, bias=bias)
    ours.load_state_dict(dense.state_dict())
    x1 = torch.randn(3, 20, 9, requires_grad=True)
    x2 = x1.detach().clone().requires_grad_()
    expected, actual = dense(x1), ours(x2)
    torch.testing.assert_close(actual, expected, **ROUNDING)
    expected.sin().sum().backward()
    actual.sin().sum().backward()
    torch.testing.assert_close(x2.grad, x1.grad, **ROUNDING)
    torch.testing.assert_close(ours.node_weights.grad, dense.linear_in.weight.grad, **ROUNDING)
    torch.testing.assert_close(ours.node_outputs.grad, dense.linear_out.weight.grad.T, **ROUNDING)
    if bias:
        torch.testing.assert_close(ours.node_biases.grad, dense.linear_in.bias.grad, **ROUNDING)


def test_the_published_training_layer_loads_our_published_state_dict():
    dense, ours = DenseUltraFFF(9, 6, 3, 2), UltraFFF(9, 6, 3, 2)
    dense.load_state_dict(ours.published_state_dict())
    x = torch.randn(20, 9)
    torch.testing.assert_close(ours(x), dense(x), **ROUNDING)
