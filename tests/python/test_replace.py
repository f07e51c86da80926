from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from families import (
    BERT,
    ENCODER,
    FAMILIES,
    GPT2,
    HIDDEN,
    LLAMA,
    SEQUENTIAL,
    WIDTH,
    Family,
    output,
)
from torch_fff import FFF, UltraFFF, replace_feedforward, restore_feedforward
from torch_fff._blocks import find_feedforward

pytestmark = pytest.mark.cpu

NOT_GATED = [family for family in FAMILIES if family.kind != "gated"]
GATED = [family for family in FAMILIES if family.kind == "gated"]


def layers_of(model: nn.Module) -> list[FFF | UltraFFF]:
    return [module for module in model.modules() if isinstance(module, FFF | UltraFFF)]


@torch.no_grad()
def replace_by_the_same_function(model: nn.Module, **arguments: Any) -> None:
    """As many trees of one neuron as the block has neurons are the dense block."""
    for block in find_feedforward(model):
        nn.init.zeros_(block.bias_out)  # UltraFFF has none
    replace_feedforward(model, depth=0, parallel_size=HIDDEN, **arguments)
    for block in find_feedforward(model):
        if block.replacement is not None:
            block.replacement.node_weights.copy_(block.linear_in)
            block.replacement.node_biases.copy_(block.bias_in)
            block.replacement.node_outputs.copy_(block.linear_out.T)


# --- what the model computes ----------------------------------------------------------------------


@pytest.mark.parametrize("family", NOT_GATED, ids=repr)
@pytest.mark.parametrize("grad", [False, True])
def test_layer_takes_the_place_of_the_dense_block_and_nothing_else(
    family: Family, grad: bool
) -> None:
    model, x = family.make(), family.input()
    for block in find_feedforward(model):
        nn.init.zeros_(block.bias_out)
    with torch.set_grad_enabled(grad):
        expected = output(model, x)
        replace_by_the_same_function(model)
        torch.testing.assert_close(output(model, x), expected)
        for layer in layers_of(model):
            nn.init.zeros_(layer.node_outputs)
        assert not torch.allclose(output(model, x), expected)


@pytest.mark.parametrize("family", GATED, ids=repr)
def test_layer_takes_the_place_of_a_whole_gated_block(family: Family) -> None:
    model = family.make()
    replace_feedforward(model, depth=2)
    layer = layers_of(model)[0]
    decoder = model.model.layers[0]
    seen: dict[str, Tensor] = {}
    norm = decoder.post_attention_layernorm
    norm.register_forward_hook(lambda module, args, y: seen.update(residual=args[0], x=y))
    decoder.register_forward_hook(lambda module, args, y: seen.update(y=y))
    with torch.no_grad():
        output(model, family.input())
        y = seen["y"] if isinstance(seen["y"], Tensor) else seen["y"][0]
        torch.testing.assert_close(y, seen["residual"] + layer(seen["x"]))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", [F.relu, F.gelu, nn.GELU()])
@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_fused_inference_does_not_bypass_the_layer(
    norm_first: bool, activation: Any, inference: Any
) -> None:
    layer = nn.TransformerEncoderLayer(
        WIDTH, 2, HIDDEN, activation=activation, batch_first=True, norm_first=norm_first
    ).eval()
    x = ENCODER.input()
    nn.init.zeros_(layer.linear2.bias)
    with inference():
        expected = layer(x)
        replace_by_the_same_function(layer)
        torch.testing.assert_close(layer(x), expected)
        restored = layer.linear1
        nn.init.zeros_(restored.node_outputs)
        attended = layer._sa_block(layer.norm1(x) if norm_first else x, None, None)
        without = x + attended if norm_first else layer.norm2(layer.norm1(x + attended))
        torch.testing.assert_close(layer(x), without)


@pytest.mark.parametrize("which", [[0], [1], None])
def test_padding_in_fused_inference(which: list[int] | None) -> None:
    """nn.TransformerEncoder would turn the batch into a nested tensor."""
    model, x = ENCODER.make(), ENCODER.input()
    for layer in model.layers:
        nn.init.zeros_(layer.linear2.bias)
    padding = torch.arange(x.shape[1]) >= torch.tensor([[7], [4], [5]])
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        replace_by_the_same_function(model, which=which)
        actual = model(x, src_key_padding_mask=padding)
        torch.testing.assert_close(actual[~padding], expected[~padding])
        assert restore_feedforward(model) == len(which or [0, 1])
        assert torch.equal(model(x, src_key_padding_mask=padding), expected)


def test_decoder_layers() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(WIDTH, 2, 1, 2, HIDDEN, batch_first=True).eval()
    x, y = ENCODER.input(), ENCODER.input(1)
    assert [row.name for row in replace_feedforward(model, depth=2, dry_run=True).rows] == [
        *("encoder.layers.0", "decoder.layers.0", "decoder.layers.1")
    ]
    with torch.no_grad():
        for block in find_feedforward(model):
            nn.init.zeros_(block.bias_out)
        expected = model(x, y)
        replace_by_the_same_function(model)
        torch.testing.assert_close(model(x, y), expected)


def test_dropout_of_hidden_neurons_goes_with_them() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, HIDDEN, dropout=0.9)
    replace_feedforward(layer, depth=2)
    layer.dropout2.p = 0.0
    x = ENCODER.input()
    with torch.no_grad():
        assert torch.equal(layer.train()._ff_block(x), layer.linear1(x))


# --- training, compiling, copying -----------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=repr)
@pytest.mark.parametrize("layer", ["ultra", "fff"])
def test_replaced_models_train(family: Family, layer: str) -> None:
    model, x = family.make(), family.input()
    options = {"leaf_width": 2, "train_hardened": True} if layer == "fff" else {}
    torch.manual_seed(0)
    replace_feedforward(model, layer, depth=3, parallel_size=2, **options)
    with torch.no_grad():
        target = torch.randn_like(output(model, x))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = F.mse_loss(output(model, x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for new in layers_of(model):
        assert all(parameter.grad.abs().max() > 0 for parameter in new.parameters())


@pytest.mark.parametrize("family", [BERT, GPT2, LLAMA, ENCODER], ids=repr)
@pytest.mark.parametrize("training", [False, True])
def test_replaced_models_compile(family: Family, training: bool) -> None:
    torch.compiler.reset()
    model, x = family.make().requires_grad_(training), family.input()
    replace_feedforward(model, depth=3)
    model.requires_grad_(training)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected, actual = output(model, x), output(compiled, x)
    torch.testing.assert_close(actual, expected)
    if training:
        wanted = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
        grads = torch.autograd.grad(actual.square().sum(), list(model.parameters()))
        torch.testing.assert_close(grads, wanted)


def test_replaced_model_compiles_with_inductor() -> None:
    torch.compiler.reset()
    model, x = ENCODER.make(), ENCODER.input()
    replace_feedforward(model, "fff", depth=3, leaf_width=2)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(output(compiled, x), output(model, x))


@pytest.mark.parametrize("family", [BERT, LLAMA, ENCODER], ids=repr)
def test_copies_are_independent(family: Family) -> None:
    model, x = family.make(), family.input()
    with torch.no_grad():
        dense = output(model, x)
        replace_feedforward(model, depth=3)
        expected = output(model, x)
        other = copy.deepcopy(model)
        assert restore_feedforward(other) == 2
        torch.testing.assert_close(output(other, x), dense)
        assert torch.equal(output(model, x), expected)
        assert len(layers_of(model)) == 2
        assert restore_feedforward(model) == 2


def test_state_dict_of_a_plain_model() -> None:
    first, second = ENCODER.make(), ENCODER.make()
    for model in (first, second):
        replace_feedforward(model, "fff", depth=2, leaf_width=3)
    second.load_state_dict(first.state_dict())
    x = ENCODER.input()
    assert torch.equal(first(x), second(x))
    names = [name for name in first.state_dict() if name.startswith("layers.0.linear")]
    own = ("node_weights", "node_biases", "w1", "b1", "w2", "b2")
    assert names == [f"layers.0.linear1.{name}" for name in own]


# --- arguments ------------------------------------------------------------------------------------


def test_options_reach_the_layer() -> None:
    model = BERT.make()
    replace_feedforward(
        model,
        "fff",
        depth=2,
        leaf_width=3,
        parallel_size=4,
        activation=nn.SiLU(),
        hardening=0.5,
        node_output=True,
    )
    for layer in layers_of(model):
        expected = "16, 3, 16, 2, activation='silu', parallel_size=4, hardening=0.5"
        assert layer.extra_repr().startswith(expected)
        assert layer.node_outputs is not None
        assert not layer.training


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", [BERT, LLAMA, ENCODER], ids=repr)
def test_layers_follow_the_blocks_dtype_device_and_mode(family: Family, dtype: torch.dtype) -> None:
    model = family.make().to(dtype)
    replace_feedforward(model, depth=2)
    x = family.input() if family.ids else family.input().to(dtype)
    assert output(model, x).dtype is dtype
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not any(layer.training for layer in layers_of(model))
    restore_feedforward(model.float())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    meta = family.make().to("meta")
    replace_feedforward(meta.train(), depth=2)
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    assert all(layer.training for layer in layers_of(meta))


@pytest.mark.parametrize(
    ("which", "replaced"),
    [
        ([0], [0]),
        ([-1], [1]),
        (range(2), [0, 1]),
        (["bert.encoder.layer.1", -1], [1]),
        (lambda name: name.endswith("0"), [0]),
    ],
)
def test_which_selects(which: Any, replaced: list[int]) -> None:
    model = BERT.make()
    report = replace_feedforward(model, depth=2, which=which)
    assert [row.name for row in report.rows] == [f"bert.encoder.layer.{i}" for i in replaced]
    states = [block.replacement is not None for block in find_feedforward(model)]
    assert states == [i in replaced for i in range(2)]


def test_layers_may_differ_from_block_to_block() -> None:
    model = BERT.make()
    first = replace_feedforward(model, depth=2, which=[0])
    replace_feedforward(model, "fff", depth=1, leaf_width=4, which=[1])
    assert [type(layer) for layer in layers_of(model)] == [UltraFFF, FFF]
    first.restore()
    assert [type(layer) for layer in layers_of(model)] == [FFF]


# --- the report -----------------------------------------------------------------------------------


def test_report_counts_parameters() -> None:
    model = BERT.make()
    report = replace_feedforward(model, depth=3, parallel_size=2)
    before = HIDDEN * (WIDTH + 1) + WIDTH * (HIDDEN + 1)
    row = report.rows[0]
    assert (row.name, row.kind, row.parameters_before) == (BERT.first, "pair", before)
    assert row.parameters == sum(p.numel() for p in layers_of(model)[0].parameters())
    assert row.parameters_per_token == 2 * 4 * (WIDTH + 1 + WIDTH)
    assert row.fraction == pytest.approx(264 / before)
    assert report.total.parameters == 2 * row.parameters
    lines = str(report).splitlines()
    assert lines[0] == "2 feedforward blocks became UltraFFF"
    assert lines[2].split() == [BERT.first, "pair", "1,072", "990", "264", "24.63%"]
    assert lines[-1].split() == ["total", "2,144", "1,980", "528", "24.63%"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 3 * 17 + 2 * 17 + 2 * 16 + 16),
        ({"parallel_size": 4}, 4 * (3 * 17 + 2 * 17 + 2 * 16 + 16)),
        ({"node_output": True}, 3 * 33 + 2 * 17 + 2 * 16 + 16),
        ({"master_leaf_width": 5}, 3 * 17 + 2 * 17 + 2 * 16 + 16 + 5 * 33 + 16 + 1),
        ({"depth": 0}, 2 * 17 + 2 * 16 + 16),
    ],
)
def test_report_counts_what_a_token_touches_of_leaves(options: Any, expected: int) -> None:
    options = {"depth": 3, "leaf_width": 2, **options}
    report = replace_feedforward(SEQUENTIAL.make(), "fff", which=[0], dry_run=True, **options)
    assert report.total.parameters_per_token == expected


def test_report_counts_the_gate() -> None:
    report = replace_feedforward(LLAMA.make(), depth=1, dry_run=True)
    assert report.rows[0].parameters_before == 3 * WIDTH * HIDDEN


@pytest.mark.parametrize("family", [BERT, LLAMA], ids=repr)
def test_dry_run_changes_nothing(family: Family) -> None:
    model = family.make()
    modules, config = repr(model), model.config.to_dict()
    report = replace_feedforward(model, depth=11, dry_run=True)
    assert str(report).startswith("2 feedforward blocks would become UltraFFF")
    assert repr(model) == modules
    assert model.config.to_dict() == config
    assert (
        str(replace_feedforward(model, depth=11)).splitlines()[1:] == (str(report).splitlines()[1:])
    )


def test_originals_can_be_given_up() -> None:
    model, x = BERT.make(), BERT.input()
    report = replace_feedforward(model, depth=2, reversible=False)
    block = find_feedforward(model)[0]
    assert {p.device.type for p in block.parameters()} == {"meta"}
    assert output(model, x).isfinite().all()
    with pytest.raises(ValueError, match="restore: block: expected the original weights of bert"):
        report.restore()


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer": "dense"}, "layer: expected one of 'ultra', 'fff', got 'dense'"),
        ({"depth": -1}, "depth: expected an integer >= 0, got -1"),
        ({"leaf_width": 3}, r"leaf_width: expected an option of UltraFFF \(depth, .*\), got 3"),
        ({"layer": "fff"}, "leaf_width: expected a value, as layer is 'fff', got None"),
        ({"dtype": torch.float32}, "dtype: expected an option of UltraFFF"),
        ({"activation": nn.Tanh()}, "activation: expected nn.ReLU.*, got Tanh"),
        ({"which": [2]}, "which: expected indices < 2 or names such as 'bert.*', got 2"),
        ({"which": ["encoder"]}, "which: expected indices < 2 or names .*, got 'encoder'"),
        ({"which": [True]}, "which: expected indices < 2 or names .*, got True"),
        ({"which": "encoder"}, "which: expected indices, names or a predicate on names, got"),
        ({"which": 1}, "which: expected indices, names or a predicate on names, got 1"),
        ({"which": []}, "which: expected some of the 2 blocks, got 'none'"),
        ({"which": lambda name: False}, "which: expected some of the 2 blocks, got 'none'"),
    ],
)
def test_wrong_arguments_leave_the_model_alone(arguments: Any, message: str) -> None:
    model = BERT.make()
    modules = repr(model)
    with pytest.raises(ValueError, match=message):
        replace_feedforward(model, **{"depth": 2, **arguments})
    assert repr(model) == modules


def test_model_without_blocks() -> None:
    with pytest.raises(ValueError, match=r"model: expected a model with feedforward .*'Linear'"):
        replace_feedforward(nn.Linear(3, 3), depth=2)
    with pytest.raises(ValueError, match="restore_feedforward: model: expected replaced blocks"):
        restore_feedforward(BERT.make())


def test_unknown_activation_has_to_be_given() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"activation: expected one to be given, .*, got Tanh"):
        replace_feedforward(nn.Sequential(model), depth=2)
    replace_feedforward(model, depth=2, activation="relu")
    assert model[0].activation == "relu"


def test_replaced_blocks_are_not_replaced_again() -> None:
    model = BERT.make()
    replace_feedforward(model, depth=2, which=[1])
    for which in (None, [1]):
        with pytest.raises(ValueError, match=r"which: expected .* not replaced .*layer.1'"):
            replace_feedforward(model, depth=2, which=which)
    assert len(layers_of(model)) == 1
    restore_feedforward(model)
    replace_feedforward(model, depth=2)
