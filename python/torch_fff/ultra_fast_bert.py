"""Checkpoints of UltraFastBERT's training code as Hugging Face models.

That code is a crammed BERT: layer norms before attention and feedforward layer and after the last
layer, one linear map for query, key and value, sinusoidal positions with a learned scale.
``RobertaPreLayerNormModel`` of ``transformers`` computes the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._arguments import reject
from .replace import replace_feedforward

__all__ = ["load_ultra_fast_bert"]

_OWNER = "load_ultra_fast_bert"
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "intermed_type": ("fff",),
    "norm": ("LayerNorm",),
    "nonlin": ("GELU", "ReLU", "SiLU"),
    "final_norm": (True,),
    "embedding.normalization": (True,),
    "embedding.pos_embedding": ("scaled-sinusoidal", "sinusoidal", "learned"),
    "attention.type": ("self-attention",),
    "attention.causal_attention": (False,),
    "attention.rotary_embedding": (False,),
    "attention.sequence_op": ("torch-softmax",),
    "attention.skip_output_projection": (False,),
}
_HEADS = ("decoder.", "prediction_head.", "pooler.", "head.")
_MODEL = {"embedding.norm": "embeddings.LayerNorm", "final_norm": "LayerNorm"}
_LAYER = {
    "norm1": "attention.LayerNorm",
    "attn.dense": "attention.output.dense",
    "norm2": "intermediate.LayerNorm",
    "ffn.linear_in": "intermediate.dense.linear_in",
    "ffn.linear_out": "intermediate.dense.linear_out",
}


def load_ultra_fast_bert(path: str | Path) -> Any:
    """The encoder of a checkpoint of UltraFastBERT's training code.

        model = load_ultra_fast_bert("UltraFastBERT-1x11-long")
        hidden = model(input_ids, attention_mask).last_hidden_state
        logits = hidden @ model.get_input_embeddings().weight.T  # masked language modelling

    Args:
        path: folder with ``config.json`` and ``model.safetensors`` or ``pytorch_model.bin``.

    Returns:
        A ``RobertaPreLayerNormModel`` in evaluation mode with :class:`UltraFFF` layers, in the
        checkpoint's dtype. Padding is expected on the right. Heads in the checkpoint are left out:
        the published model predicts by the word embeddings, as above.

    Raises:
        ValueError: the architecture is another one, or weights are missing or left over.
    """
    from transformers import RobertaPreLayerNormConfig, RobertaPreLayerNormModel

    folder = Path(path)
    arch = json.loads((folder / "config.json").read_text()).get("arch")
    if not isinstance(arch, dict):
        reject(_OWNER, "path", "a config.json with the training code's arch", str(path))
    for name, choices in _SUPPORTED.items():
        value: Any = arch
        for part in name.split("."):
            value = value.get(part)
        if value not in choices:
            reject(_OWNER, f"arch.{name}", " or ".join(map(repr, choices)), value)
    state = _encoder_state(_read(folder))
    word = _take(state, "embedding.word_embedding.weight")
    attention, embedding = arch["attention"], arch["embedding"]
    padding = embedding["pad_token_id"]
    neurons = arch["intermed_size"] * (2 ** (arch["intermed_depth"] + 1) - 1)
    config = RobertaPreLayerNormConfig(
        vocab_size=len(word),
        hidden_size=arch["hidden_size"],
        num_hidden_layers=arch["num_transformer_layers"],
        num_attention_heads=attention["num_attention_heads"],
        intermediate_size=neurons,
        hidden_act=arch["nonlin"].lower(),
        hidden_dropout_prob=arch["hidden_dropout_prob"],
        attention_probs_dropout_prob=attention["dropout_prob"],
        layer_norm_eps=float(arch["norm_eps"]),
        max_position_embeddings=embedding["max_seq_length"] + padding + 1,
        type_vocab_size=1,
        pad_token_id=padding,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = RobertaPreLayerNormModel(config, add_pooling_layer=False).to(word.dtype)
    replace_feedforward(
        model,
        depth=arch["intermed_depth"],
        parallel_size=arch["intermed_size"],
        reversible=False,
    )
    converted = _converted(state, config, word, embedding["pos_embedding"])
    if state:
        reject(_OWNER, "path", "a checkpoint without other weights", sorted(state)[0])
    model.load_state_dict(converted)
    return model.eval()


def _read(folder: Path) -> dict[str, Tensor]:
    if (folder / "model.safetensors").exists():
        from safetensors.torch import load_file

        state: dict[str, Tensor] = load_file(folder / "model.safetensors")
    else:
        file = folder / "pytorch_model.bin"
        state = torch.load(file, map_location="cpu", weights_only=True)
    return state


def _encoder_state(checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's part by names within it. A compiled model's names have ``_orig_mod.``."""
    names = {name.replace("_orig_mod.", ""): value for name, value in checkpoint.items()}
    return {
        name.removeprefix("encoder."): value
        for name, value in names.items()
        if not name.startswith(_HEADS) and not name.endswith(".norm_factor")  # 1 / sqrt(head width)
    }


def _take(state: dict[str, Tensor], name: str) -> Tensor:
    if name not in state:
        reject(_OWNER, "path", f"a checkpoint with {name}", "none")
    return state.pop(name)


def _converted(
    state: dict[str, Tensor], config: Any, word: Tensor, positions: str
) -> dict[str, Tensor]:
    """The model's state dict. What is used is taken out of ``state``."""
    width = config.hidden_size
    result = {
        "embeddings.word_embeddings.weight": word,
        "embeddings.token_type_embeddings.weight": word.new_zeros(1, width),
        "embeddings.position_embeddings.weight": _positions(state, config, word, positions),
    }
    names = dict(_MODEL)
    for index in range(config.num_hidden_layers):
        here, there = f"layers.{index}", f"encoder.layer.{index}"
        names.update({f"{here}.{a}": f"{there}.{b}" for a, b in _LAYER.items()})
        fused = f"{here}.attn.self_attention.query_key_value"
        weight = _take(state, f"{fused}.weight")
        bias = state.pop(f"{fused}.bias", weight.new_zeros(len(weight)))
        heads = config.num_attention_heads
        for part, name in enumerate(("query", "key", "value")):
            # Head by head, each with its rows of the query, of the key and of the value.
            for kind, value in (("weight", weight), ("bias", bias)):
                rows = value.unflatten(0, (heads, 3, -1))[:, part].flatten(0, 1)
                result[f"{there}.attention.self.{name}.{kind}"] = rows.contiguous()
    for old, new in names.items():
        weight = result[f"{new}.weight"] = _take(state, f"{old}.weight")
        if not old.endswith("linear_out"):
            result[f"{new}.bias"] = state.pop(f"{old}.bias", weight.new_zeros(len(weight)))
    return result


def _positions(state: dict[str, Tensor], config: Any, word: Tensor, kind: str) -> Tensor:
    """The table of position embeddings, the first position in the row after the padding's."""
    first = config.pad_token_id + 1
    count = config.max_position_embeddings - first
    name = "embedding.pos_embedding"
    if kind == "learned":
        state.pop(f"{name}.position_ids", None)
        table = _take(state, f"{name}.embedding.weight")
    else:
        exponent = torch.arange(0, config.hidden_size, 2) / config.hidden_size
        angle = torch.arange(count).unsqueeze(1) / 10000**exponent
        table = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)
        if kind == "scaled-sinusoidal":
            table = table * _take(state, f"{name}.scale_factor")
    padding = table.new_zeros(first, config.hidden_size)
    return torch.cat([padding, table]).to(word.dtype)
