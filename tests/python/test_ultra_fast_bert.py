"""The checkpoints are made here, and what they should compute is written out on their names."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torch_fff import UltraFFF, load_pretrained, load_ultra_fast_bert, reference

pytestmark = pytest.mark.cpu

pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")

HEADS, WIDTH, VOCABULARY, LENGTH, LAYERS, TREES, DEPTH = 2, 12, 30, 9, 2, 3, 2
ARCH: dict[str, Any] = {
    "num_transformer_layers": LAYERS,
    "intermed_type": "fff",
    "hidden_size": WIDTH,
    "intermed_size": TREES,
    "intermed_depth": DEPTH,
    "hidden_dropout_prob": 0.1,
    "norm": "LayerNorm",
    "norm_eps": 1e-12,
    "nonlin": "GELU",
    "final_norm": True,
    "embedding": {
        "pos_embedding": "scaled-sinusoidal",
        "pad_token_id": 0,
        "max_seq_length": LENGTH,
        "normalization": True,
    },
    "attention": {
        "type": "self-attention",
        "causal_attention": False,
        "num_attention_heads": HEADS,
        "dropout_prob": 0.1,
        "skip_output_projection": False,
        "rotary_embedding": False,
        "sequence_op": "torch-softmax",
    },
}


def checkpoint(bias: bool = False, positions: str = "scaled-sinusoidal") -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = {"encoder.embedding.word_embedding.weight": torch.randn(VOCABULARY, WIDTH)}
    if positions == "learned":
        name = "encoder.embedding.pos_embedding.embedding.weight"
        state[name] = torch.randn(LENGTH, WIDTH)
    elif positions == "scaled-sinusoidal":
        state["encoder.embedding.pos_embedding.scale_factor"] = torch.tensor([0.7])

    def add(name: str, *shape: int, bias: bool) -> None:
        state[f"encoder.{name}.weight"] = torch.randn(shape)
        if bias:
            state[f"encoder.{name}.bias"] = torch.randn(shape[0])

    for name in ("embedding.norm", "final_norm"):
        add(name, WIDTH, bias=True)
    nodes = TREES * (2 ** (DEPTH + 1) - 1)
    for i in range(LAYERS):
        add(f"layers.{i}.norm1", WIDTH, bias=True)
        add(f"layers.{i}.norm2", WIDTH, bias=True)
        attention = f"layers.{i}.attn"
        add(f"{attention}.self_attention.query_key_value", 3 * WIDTH, WIDTH, bias=bias)
        state[f"encoder.{attention}.self_attention.norm_factor"] = torch.tensor(6.0).rsqrt()
        add(f"{attention}.dense", WIDTH, WIDTH, bias=bias)
        add(f"layers.{i}.ffn.linear_in", nodes, WIDTH, bias=True)
        add(f"layers.{i}.ffn.linear_out", WIDTH, nodes, bias=False)
    state["decoder.weight"] = state["encoder.embedding.word_embedding.weight"].clone()
    return state


def published(state: dict[str, Tensor], ids: Tensor, mask: Tensor, positions: str) -> Tensor:
    """The training code's encoder, in float64."""
    state = {name.removeprefix("encoder."): value.double() for name, value in state.items()}

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-12)

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    length = ids.shape[1]
    table = torch.zeros(length, WIDTH, dtype=torch.float64)
    for position in range(length):
        for i in range(0, WIDTH, 2):
            angle = torch.tensor(position / 10000 ** (i / WIDTH), dtype=torch.float64)
            table[position, i], table[position, i + 1] = angle.sin(), angle.cos()
    if positions == "learned":
        table = state["embedding.pos_embedding.embedding.weight"][:length]
    elif positions == "scaled-sinusoidal":
        table = table * state["embedding.pos_embedding.scale_factor"]
    x = norm("embedding.norm", state["embedding.word_embedding.weight"][ids] + table)
    for i in range(LAYERS):
        attention = f"layers.{i}.attn"
        fused = linear(f"{attention}.self_attention.query_key_value", norm(f"layers.{i}.norm1", x))
        per_head = fused.view(*ids.shape, HEADS, 3 * WIDTH // HEADS)
        q, k, v = (part.transpose(1, 2) for part in per_head.split(WIDTH // HEADS, dim=3))
        scores = q @ k.transpose(2, 3) * state[f"{attention}.self_attention.norm_factor"]
        weights = (scores - 10000.0 * (1 - mask.double())[:, None, None]).softmax(3)
        context = (weights @ v).transpose(1, 2).reshape(*ids.shape, WIDTH)
        x = x + linear(f"{attention}.dense", context)
        name = f"layers.{i}.ffn"
        x = (
            x
            + reference.tree(
                norm(f"layers.{i}.norm2", x),
                state[f"{name}.linear_in.weight"],
                state[f"{name}.linear_in.bias"],
                state[f"{name}.linear_out.weight"].T,
                trees=TREES,
                tie_right=False,
                node_activation="gelu",
            )[0]
        )
    return norm("final_norm", x)


def save(folder: Path, state: dict[str, Tensor], arch: dict[str, Any], binary: bool) -> None:
    config = {"model_type": "crammedBERT", "arch": arch}
    (folder / "config.json").write_text(json.dumps(config))
    if binary:
        torch.save(state, folder / "pytorch_model.bin")
    else:
        safetensors.save_file(state, folder / "model.safetensors")


@pytest.mark.parametrize("positions", ["scaled-sinusoidal", "sinusoidal", "learned"])
@pytest.mark.parametrize("bias", [False, True])
def test_checkpoint_computes_what_the_training_code_does(
    bias: bool, positions: str, tmp_path: Path
) -> None:
    state = checkpoint(bias, positions)
    arch = copy.deepcopy(ARCH)
    arch["embedding"]["pos_embedding"] = positions
    double = {name: value.double() for name, value in state.items()}
    save(tmp_path, double, arch, binary=bias)
    model = load_ultra_fast_bert(tmp_path)
    layers = [module for module in model.modules() if isinstance(module, UltraFFF)]
    assert [(layer.depth, layer.parallel_size) for layer in layers] == [(DEPTH, TREES)] * LAYERS
    assert not model.training
    ids = torch.randint(1, VOCABULARY, (3, LENGTH))
    mask = torch.arange(LENGTH) < torch.tensor([[9], [4], [7]])
    ids = ids * mask
    with torch.no_grad():
        actual = model(ids, mask.long()).last_hidden_state
    expected = published(state, ids, mask, positions)
    torch.testing.assert_close(actual[mask], expected[mask], rtol=1e-4, atol=1e-5)


def test_names_of_a_compiled_model_and_a_second_save(tmp_path: Path) -> None:
    state = {f"_orig_mod.{name}": value for name, value in checkpoint().items()}
    save(tmp_path, state, ARCH, binary=False)
    model = load_ultra_fast_bert(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path / "again")
    again = load_pretrained(type(model), tmp_path / "again", add_pooling_layer=False)
    ids = torch.randint(1, VOCABULARY, (2, LENGTH))
    with torch.no_grad():
        assert torch.equal(again(ids)[0], model(ids)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"intermed_type": "ff"}, "arch.intermed_type: expected 'fff', got 'ff'"),
        ({"norm": "RMSNorm"}, "arch.norm: expected 'LayerNorm', got 'RMSNorm'"),
        (
            {"attention": {**ARCH["attention"], "rotary_embedding": True}},
            "arch.attention.rotary_embedding: expected False, got True",
        ),
    ],
)
def test_other_architectures_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    save(tmp_path, checkpoint(), {**ARCH, **change}, binary=False)
    with pytest.raises(ValueError, match=message):
        load_ultra_fast_bert(tmp_path)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    state = checkpoint()
    save(tmp_path, {**state, "encoder.odd": torch.ones(1)}, ARCH, binary=False)
    with pytest.raises(ValueError, match=r"path: expected a checkpoint without .*, got 'odd'"):
        load_ultra_fast_bert(tmp_path)
    del state["encoder.layers.1.ffn.linear_in.weight"]
    save(tmp_path, state, ARCH, binary=False)
    with pytest.raises(ValueError, match=r"a checkpoint with layers\.1\.ffn\.linear_in\.weight"):
        load_ultra_fast_bert(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"path: expected a config\.json with the training code"):
        load_ultra_fast_bert(tmp_path)
