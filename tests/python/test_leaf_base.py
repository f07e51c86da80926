"""FFF(shared_leaf_base=True): leaves as a base and their own differences, and folding it away."""

import copy

import pytest
import torch
import transformers
from torch.nn.utils import parametrize

from families import BERT, output
from torch_fff import FFF, load_pretrained, optim, reference, replace_feedforward
from torch_fff._options import parameters_per_token

EXACT = {"rtol": 1e-11, "atol": 1e-12}
NAMES = ("w1", "b1", "w2", "b2")
SIZES = {"input_width": 4, "leaf_width": 3, "output_width": 5, "depth": 2}


def trained(**options):
    """A layer in float64 whose leaves have left their base."""
    torch.manual_seed(0)
    layer = FFF(**SIZES, parallel_size=2, shared_leaf_base=True, dtype=torch.float64, **options)
    with torch.no_grad():
        for name in NAMES:
            getattr(layer, name).normal_(std=0.3)
    return layer


def plain(layer):
    """The same function without a base, its leaves added up one by one."""
    twin = FFF(**SIZES, parallel_size=2, dtype=torch.float64, train_hardened=layer.train_hardened)
    with torch.no_grad():
        for name in ("node_weights", "node_biases"):
            getattr(twin, name).copy_(getattr(layer, name))
        for name in NAMES:
            for row, leaf in enumerate(getattr(layer, name)):
                tree = row // layer.n_leaves
                getattr(twin, name)[row] = getattr(layer, f"base_{name}")[tree] + leaf
    return twin


def test_leaves_start_as_their_base():
    layer = FFF(**SIZES, parallel_size=2, shared_leaf_base=True)
    for name, fan_in in (("w1", 4), ("b1", 4), ("w2", 6), ("b2", 6)):
        own, base = getattr(layer, name), getattr(layer, f"base_{name}")
        assert base.shape == (2, *own.shape[1:])
        assert not own.any()
        assert 0 < base.abs().max() <= fan_in**-0.5
    assert layer.reset_parameters() is None
    assert not layer.w1.any()


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_output_and_gradients_are_those_of_the_sums(hard):
    layer = trained(train_hardened=hard)
    twin = plain(layer)
    x = torch.randn(30, 4, dtype=torch.float64)
    y, expected = layer(x), twin(x)
    torch.testing.assert_close(y, expected, **EXACT)
    y.sin().sum().backward()
    expected.sin().sum().backward()
    torch.testing.assert_close(layer.node_weights.grad, twin.node_weights.grad, **EXACT)
    for name in NAMES:
        own, gradient = getattr(layer, name).grad, getattr(twin, name).grad
        torch.testing.assert_close(own, gradient, **EXACT)
        of_base = gradient.unflatten(0, (2, -1)).sum(1)
        torch.testing.assert_close(getattr(layer, f"base_{name}").grad, of_base, **EXACT)


def test_reference_adds_a_tree_s_base_to_its_leaves():
    base, own = torch.tensor([[1.0], [10.0]]), torch.tensor([[0.1], [0.2], [0.3], [0.4]])
    expected = torch.tensor([[1.1], [1.2], [10.3], [10.4]])
    torch.testing.assert_close(reference.add_leaf_base(base, own), expected)


ALL_OPTIONS = {
    "dropout": 0.2,
    "region_leak": 0.1,
    "usage_mode": "hard",
    "node_output": True,
    "noise": 0.3,
    "alternates": 1,
    "min_slope": 0.1,
    "prune": 0.05,
    "hardening": 0.1,
    "balance": 0.1,
    "master_leaf_width": 2,
}


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("options", [{}, ALL_OPTIONS], ids=["plain", "all options"])
def test_folding_changes_nothing_but_the_form(options, hard):
    layer = trained(train_hardened=hard, **options)
    folded = copy.deepcopy(layer)
    w1 = folded.w1
    assert folded.fold() is folded
    assert folded.w1 is w1
    assert not [name for name in folded.state_dict() if "base" in name]
    x = torch.randn(30, 4, dtype=torch.float64)
    results = []
    for one in (layer, folded):
        torch.manual_seed(1)
        y = one(x)
        y.sin().sum().backward()
        results.append((y, one.node_weights.grad, one.w1.grad, one.eval()(x)))
    torch.testing.assert_close(*results, rtol=0, atol=0)
    ordinary = FFF(**SIZES, parallel_size=2, **options, train_hardened=hard)
    assert repr(folded) == repr(ordinary)
    ordinary.load_state_dict(folded.state_dict())
    state = copy.deepcopy(folded.state_dict())
    torch.testing.assert_close(folded.fold().state_dict(), state, rtol=0, atol=0)


def test_row_sparse_gradients_are_refused():
    with pytest.raises(ValueError, match="FFF: row_sparse_grad: expected False with shared_leaf"):
        FFF(**SIZES, shared_leaf_base=True, row_sparse_grad=True)


def test_parametrised_leaves_cannot_be_folded():
    layer = trained()
    parametrize.register_parametrization(layer, "w1", torch.nn.Identity())
    with pytest.raises(ValueError, match=r"FFF\.fold: w1: expected a parameter"):
        layer.fold()


def test_base_has_a_parameter_group_of_its_own():
    layer = trained(train_hardened=True, usage_mode="hard", routing_gradient="none")
    nodes, leaves, base = (
        layer.get_node_param_group(),
        layer.get_leaf_param_group(),
        layer.get_leaf_base_param_group(),
    )
    grouped = [p for group in (nodes, leaves, base) for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in layer.parameters()}
    assert not plain(layer).get_leaf_base_param_group()["params"]
    # Too few tokens for any leaf; the base, which all of them use, is updated.
    optimizer = optim.LocalSGD([nodes, leaves | {"local_batch_size": 100}, base], lr=0.1)
    before = copy.deepcopy(layer)
    layer(torch.randn(30, 4, dtype=torch.float64)).sin().sum().backward()
    gradient = layer.base_w1.grad.clone()
    optimizer.step()
    assert torch.equal(layer.w1, before.w1)
    torch.testing.assert_close(layer.base_w1, before.base_w1 - 0.1 * gradient)


@pytest.mark.parametrize("published", [False, True])
def test_checkpoints_of_the_other_kind_are_refused(published):
    with_base, without = FFF(**SIZES, shared_leaf_base=True), FFF(**SIZES)
    with pytest.raises(RuntimeError, match="shared_leaf_base: expected no base, the checkpoint"):
        without.load_state_dict(with_base.state_dict())
    state = without.published_state_dict() if published else without.state_dict()
    with pytest.raises(RuntimeError, match="shared_leaf_base: expected a base, the checkpoint has"):
        with_base.load_state_dict(state)
    again = FFF(**SIZES, shared_leaf_base=True)
    again.load_state_dict(with_base.state_dict())
    torch.testing.assert_close(again.state_dict(), with_base.state_dict(), rtol=0, atol=0)


def test_published_form_is_folded():
    torch.manual_seed(0)
    layer = FFF(**SIZES, shared_leaf_base=True)
    with torch.no_grad():
        layer.w2.normal_()
    published = layer.published_state_dict()
    assert not any(value.requires_grad for value in published.values())
    expected = copy.deepcopy(layer).fold().published_state_dict()
    torch.testing.assert_close(published, expected, rtol=0, atol=0)
    assert layer.shared_leaf_base


def test_base_counts_as_folded_for_a_token():
    assert parameters_per_token(trained()) == parameters_per_token(plain(trained()))


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_compiled(hard):
    layer = trained(train_hardened=hard)
    x = torch.randn(20, 4, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x), **EXACT)


def test_saved_hugging_face_model_keeps_its_base(tmp_path):
    model, x = BERT.make(), BERT.input()
    replace_feedforward(model, "fff", depth=2, leaf_width=3, shared_leaf_base=True)
    assert model.config.torch_fff[0]["shared_leaf_base"] is True
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.w2.normal_()
    expected = output(model, x)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(transformers.BertForMaskedLM, tmp_path)
    torch.testing.assert_close(output(loaded, x), expected)
