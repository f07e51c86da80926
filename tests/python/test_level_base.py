"""UltraFFF(shared_level_base=True): nodes as a base of their level and their own differences."""

import copy

import pytest
import torch
import transformers
from torch.nn.utils import parametrize

from families import BERT, output
from torch_fff import UltraFFF, diagnostics, load_pretrained, reference, replace_feedforward
from torch_fff._options import parameters_per_token
from torch_fff.init import from_dense_, median_splits_

EXACT = {"rtol": 1e-11, "atol": 1e-12}
BASES = {
    "node_weights": "base_weights",
    "node_biases": "base_biases",
    "node_outputs": "base_outputs",
}
SIZES = {"input_width": 4, "output_width": 5, "depth": 2}
DOUBLE = {"dtype": torch.float64}


def trained(dtype=torch.float64, **options):
    """A layer whose nodes have left their base."""
    torch.manual_seed(0)
    layer = UltraFFF(**SIZES, parallel_size=2, shared_level_base=True, dtype=dtype, **options)
    with torch.no_grad():
        for name in BASES:
            if getattr(layer, name) is not None:
                getattr(layer, name).normal_(std=0.3)
    return layer


def plain(layer, **options):
    """The same function without a base, its nodes added up one by one."""
    bias = layer.node_biases is not None
    options = {"dtype": layer.node_weights.dtype, "bias": bias, **options}
    twin = UltraFFF(**SIZES, parallel_size=2, **options)
    with torch.no_grad():
        for name, base in BASES.items():
            for row in range(2 * 7 if getattr(twin, name) is not None else 0):
                tree, node = divmod(row, 7)
                level = (0, 1, 1, 2, 2, 2, 2)[node]
                value = getattr(layer, base)[tree, level] + getattr(layer, name)[row]
                getattr(twin, name)[row] = value
    return twin


def test_nodes_start_as_their_base():
    layer = UltraFFF(**SIZES, parallel_size=2, shared_level_base=True)
    for (name, base), fan_in in zip(BASES.items(), (4, 4, 6), strict=True):
        own, shared = getattr(layer, name), getattr(layer, base)
        assert shared.shape == (2, 3, *own.shape[1:])
        assert not own.any()
        assert 0 < shared.abs().max() <= fan_in**-0.5
    torch.nn.init.ones_(layer.node_weights)
    layer.reset_parameters()
    assert not layer.node_weights.any()
    assert UltraFFF(**SIZES, bias=False, shared_level_base=True).base_biases is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("routing", ["none", "straight_through"])
def test_output_and_gradients_are_those_of_the_sums(bias, routing):
    layer = trained(bias=bias, routing_gradient=routing)
    twin = plain(layer, routing_gradient=routing)
    x = torch.randn(30, 4, **DOUBLE)
    y, expected = layer(x), twin(x)
    torch.testing.assert_close(y, expected, **EXACT)
    y.sin().sum().backward()
    expected.sin().sum().backward()
    for name, base in BASES.items():
        if getattr(twin, name) is None:
            continue
        gradient = getattr(twin, name).grad
        torch.testing.assert_close(getattr(layer, name).grad, gradient, **EXACT)
        levels = gradient.unflatten(0, (2, 7)).split((1, 2, 4), 1)
        of_base = torch.stack([level.sum(1) for level in levels], 1)
        torch.testing.assert_close(getattr(layer, base).grad, of_base, **EXACT)


def test_reference_adds_a_level_s_base_to_its_nodes():
    base = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    own = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    expected = torch.tensor([1.1, 2.2, 2.3, 10.4, 20.5, 20.6])
    torch.testing.assert_close(reference.add_level_base(base, own), expected)


ALL_OPTIONS = {
    "bias": False,
    "output_bias": True,
    "routing_gradient": "straight_through",
    "noise": 0.3,
    "alternates": 1,
    "min_slope": 0.1,
}


@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["plain", "all options"])
def test_folding_changes_nothing_but_the_form(options):
    layer = trained(**options)
    folded = copy.deepcopy(layer)
    weights = folded.node_weights
    assert folded.fold() is folded
    assert folded.node_weights is weights
    assert not [name for name in folded.state_dict() if "base" in name]
    x = torch.randn(30, 4, **DOUBLE)
    results = []
    for one in (layer, folded):
        torch.manual_seed(1)
        y = one(x)
        y.sin().sum().backward()
        results.append((y, one.node_weights.grad, one.node_outputs.grad, one.eval()(x)))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    ordinary = UltraFFF(**SIZES, parallel_size=2, **options)
    assert repr(folded) == repr(ordinary)
    ordinary.load_state_dict(folded.state_dict())
    state = copy.deepcopy(folded.state_dict())
    torch.testing.assert_close(folded.fold().state_dict(), state, rtol=0, atol=0)


def test_row_sparse_gradients_are_refused():
    with pytest.raises(
        ValueError, match="UltraFFF: row_sparse_grad: expected False with shared_level"
    ):
        UltraFFF(**SIZES, shared_level_base=True, row_sparse_grad=True)


@pytest.mark.parametrize("name", ["node_outputs", "base_weights"])
def test_parametrised_nodes_cannot_be_folded(name):
    layer = trained()
    parametrize.register_parametrization(layer, name, torch.nn.Identity())
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=rf"UltraFFF\.fold: {name}: expected a parameter"):
        layer.fold()
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    assert layer.shared_level_base


@pytest.mark.parametrize("published", [False, True])
def test_checkpoints_of_the_other_kind_are_refused(published):
    with_base, without = trained(), UltraFFF(**SIZES, parallel_size=2)
    with pytest.raises(RuntimeError, match="shared_level_base: expected no base, the checkpoint"):
        without.load_state_dict(with_base.state_dict())
    state = without.published_state_dict() if published else without.state_dict()
    with pytest.raises(RuntimeError, match="shared_level_base: expected a base, the checkpoint ha"):
        with_base.load_state_dict(state)
    again = UltraFFF(**SIZES, parallel_size=2, shared_level_base=True, **DOUBLE)
    again.load_state_dict(with_base.state_dict())
    torch.testing.assert_close(again.state_dict(), with_base.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_published_form_is_folded(bias):
    layer = trained(bias=bias)
    published = layer.published_state_dict()
    assert not any(value.requires_grad for value in published.values())
    expected = copy.deepcopy(layer).fold().published_state_dict()
    torch.testing.assert_close(published, expected, rtol=0, atol=0)
    assert layer.shared_level_base


def test_base_counts_as_folded_for_a_token():
    assert parameters_per_token(trained()) == parameters_per_token(plain(trained()))


def test_diagnostics_see_the_sums():
    layer, x = trained(), torch.randn(40, 4, **DOUBLE)
    twin = plain(layer)
    soft = diagnostics.soft_output
    torch.testing.assert_close(soft(layer, x), soft(twin, x), **EXACT)
    found, expected = layer.report(x), twin.report(x)
    assert found.decision_entropy == pytest.approx(expected.decision_entropy)
    assert found.leaves_used == expected.leaves_used


def test_median_splits_start_from_the_sums():
    layer, x = trained(), torch.randn(64, 4, **DOUBLE)
    twin = median_splits_(plain(layer), x)
    assert median_splits_(layer, x) is layer
    torch.testing.assert_close(layer(x), twin(x), **EXACT)
    assert not layer.base_weights.any()
    assert layer.shared_level_base


def test_start_from_a_dense_block_has_no_base():
    layer, x = trained(), torch.randn(64, 4, **DOUBLE)
    shapes = ((20, 4), (20,), (5, 20), (5,))
    dense = [torch.randn(shape, **DOUBLE) for shape in shapes]
    twin = from_dense_(plain(layer), *dense, x)
    from_dense_(layer, *dense, x)
    torch.testing.assert_close(layer(x), twin(x), **EXACT)


@pytest.mark.parametrize("training", [False, True])
def test_compiled(training):
    layer = trained(routing_gradient="straight_through").train(training)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    x = torch.randn(20, 4, **DOUBLE)
    for one in (layer, compiled):
        y = one(x)
        torch.testing.assert_close(y, layer(x), **EXACT)
        y.sin().sum().backward()
    gradients = [[p.grad for p in one.parameters()] for one in (layer, compiled)]
    for expected, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, **EXACT)


def test_exported():
    layer, x = trained().eval(), torch.randn(20, 4, **DOUBLE)
    tokens = torch.export.Dim("tokens")
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: tokens},))
    more = torch.randn(7, 4, **DOUBLE)
    torch.testing.assert_close(program.module()(more), layer(more), **EXACT)


def test_autocast_adds_in_the_parameters_dtype():
    layer, x = trained(dtype=torch.float32), torch.randn(20, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), plain(layer)(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


def test_per_sample_gradients():
    layer, x = trained(), torch.randn(6, 4, **DOUBLE)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, token):
        return torch.func.functional_call(layer, parameters, (token,)).sin().sum()

    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for row, token in enumerate(x):
        expected = torch.autograd.grad(layer(token).sin().sum(), list(layer.parameters()))
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(got[name][row], gradient, **EXACT)


def test_saved_hugging_face_model_keeps_its_base(tmp_path):
    model, x = BERT.make(), BERT.input()
    replace_feedforward(model, depth=2, shared_level_base=True)
    assert model.config.torch_fff[0]["shared_level_base"] is True
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.node_outputs.normal_()
    expected = output(model, x)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(transformers.BertForMaskedLM, tmp_path)
    torch.testing.assert_close(output(loaded, x), expected)
