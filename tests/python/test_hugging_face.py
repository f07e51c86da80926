from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from families import BERT, GPT2, HUGGING_FACE, LLAMA, VIT, WIDTH, Family, output
from torch_fff import FFF, UltraFFF, load_pretrained, replace_feedforward, restore_feedforward
from torch_fff._blocks import find_feedforward
from torch_fff._options import layer_options

pytestmark = pytest.mark.cpu

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")


@pytest.mark.parametrize("family", HUGGING_FACE, ids=repr)
def test_saved_models_load(family: Family, tmp_path: Path) -> None:
    model, x = family.make(), family.input()
    replace_feedforward(model, depth=3, parallel_size=2, which=[0], routing_gradient="none")
    replace_feedforward(
        model, "fff", depth=2, leaf_width=3, which=[1], activation="silu", node_output=True
    )
    with torch.no_grad():
        expected = output(model, x)
    model.save_pretrained(tmp_path)
    stored = safetensors.load_file(tmp_path / "model.safetensors")
    assert sum(name.endswith("node_weights") for name in stored) == 2

    loaded = load_pretrained(type(model), tmp_path)
    assert type(loaded) is type(model)
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(output(loaded, x), expected)
    assert loaded.config.torch_fff == model.config.torch_fff
    blocks = find_feedforward(loaded)
    assert [type(block.replacement) for block in blocks] == [UltraFFF, FFF]

    loaded.save_pretrained(tmp_path / "again")
    again = load_pretrained(type(model), tmp_path / "again", dtype=torch.float64)
    assert {p.dtype for p in again.parameters()} == {torch.float64}
    state = model.state_dict()
    assert all(
        torch.equal(value, state[name].double()) for name, value in again.state_dict().items()
    )


@pytest.mark.parametrize("family", [BERT, GPT2, LLAMA, VIT], ids=repr)
def test_backbone_of_a_saved_model_loads_and_the_other_way_round(
    family: Family, tmp_path: Path
) -> None:
    model = family.make()
    replace_feedforward(model, depth=3)
    model.save_pretrained(tmp_path / "whole")
    backbone = load_pretrained(transformers.AutoModel, tmp_path / "whole")
    assert type(backbone) is type(model.base_model)
    for block, original in zip(find_feedforward(backbone), find_feedforward(model), strict=True):
        weights = original.replacement.state_dict()
        assert all(
            torch.equal(value, weights[name])
            for name, value in block.replacement.state_dict().items()
        )
    backbone.save_pretrained(tmp_path / "backbone")
    whole = load_pretrained(type(model), tmp_path / "backbone")
    assert find_feedforward(whole)[0].name == family.first
    for block, original in zip(find_feedforward(whole), find_feedforward(model), strict=True):
        assert torch.equal(block.replacement.node_weights, original.replacement.node_weights)


def test_config_tells_what_is_replaced(tmp_path: Path) -> None:
    model = BERT.make()
    report = replace_feedforward(model, depth=3, parallel_size=2, noise=0.5)
    names = [row.name for row in report.rows]
    entry = {"layer": "ultra", "depth": 3, "parallel_size": 2, "activation": "gelu", "noise": 0.5}
    assert model.config.torch_fff == [{**entry, "which": names}]
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["torch_fff"] == model.config.torch_fff
    restore_feedforward(model)
    assert not hasattr(model.config, "torch_fff")
    second = replace_feedforward(model, depth=1, which=[0])
    replace_feedforward(model, depth=2, which=[1])
    assert [entry["depth"] for entry in model.config.torch_fff] == [1, 2]
    second.restore()
    assert [entry["depth"] for entry in model.config.torch_fff] == [2]


@pytest.mark.parametrize(
    "layer",
    [
        UltraFFF(4, 4, 2, 3, "silu", bias=False, output_bias=True, slope=2.0),
        FFF(
            4,
            3,
            4,
            2,
            torch.nn.GELU(),
            dropout=0.1,
            node_output=True,
            node_activation="identity",
            usage_mode="hard",
            balance=0.1,
            master_leaf_width=2,
            shared_leaf_base=True,
        ),
    ],
    ids=["ultra", "fff"],
)
def test_options_describe_a_layer(layer: FFF | UltraFFF) -> None:
    options = json.loads(json.dumps(layer_options(layer)))
    kind = FFF if options.pop("layer") == "fff" else UltraFFF
    again = kind(input_width=4, output_width=4, **options)
    assert again.extra_repr() == layer.extra_repr()
    again.load_state_dict(layer.state_dict())


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    model = BERT.make()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="load_pretrained: path: expected a model saved after"):
        load_pretrained(transformers.BertForMaskedLM, tmp_path)
    replace_feedforward(model, depth=2)
    model.config.save_pretrained(tmp_path)  # beside the weights of the dense model
    with pytest.raises(ValueError, match=r"expected a checkpoint with bert.*node_biases and all"):
        load_pretrained(transformers.BertForMaskedLM, tmp_path)
    config = transformers.DistilBertConfig(dim=WIDTH, n_heads=2, n_layers=2, hidden_dim=8)
    config.torch_fff = model.config.torch_fff
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"expected a model with the block bert.*DistilBertModel"):
        load_pretrained(transformers.AutoModel, tmp_path)


@pytest.mark.parametrize("family", [GPT2, LLAMA], ids=repr)
def test_generation_token_by_token_is_that_of_the_whole_text(family: Family) -> None:
    model = family.make()
    replace_feedforward(model, depth=3)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(family.input(), use_cache=True, **options)
    assert torch.equal(cached, model.generate(family.input(), use_cache=False, **options))
