"""Small models of every family whose feedforward blocks can be replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

WIDTH, HIDDEN, TOKENS = 16, 32, 7


@dataclass(frozen=True)
class Family:
    """make: the model, in eval mode. kind, activation, first: of its two blocks."""

    name: str
    make: Callable[[], nn.Module]
    kind: str
    activation: str
    first: str
    images: bool = False
    ids: bool = True

    def input(self, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if self.images:
            return torch.randn(3, 3, 8, 8, generator=generator)
        if self.ids:
            return torch.randint(5, 40, (3, TOKENS), generator=generator)
        return torch.randn(3, TOKENS, WIDTH, generator=generator)

    def __repr__(self) -> str:
        return self.name


def output(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y if isinstance(y, Tensor) else y[0]


def _bert_like(model: str, config: str, **more: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers = pytest.importorskip("transformers")
        transformers.utils.logging.disable_progress_bar()
        torch.manual_seed(0)
        sizes = {
            "hidden_size": WIDTH,
            "intermediate_size": HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 40,
            "max_position_embeddings": 16,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        arguments = {**sizes, **more}
        return getattr(transformers, model)(getattr(transformers, config)(**arguments)).eval()

    return make


def _encoder() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, HIDDEN, activation="gelu", batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


def _sequential() -> nn.Module:
    torch.manual_seed(0)
    blocks = (
        nn.Sequential(
            nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Dropout(0.1), nn.Linear(HIDDEN, WIDTH)
        )
        for _ in range(2)
    )
    return nn.Sequential(*blocks).eval()


_DISTIL = {"dim": WIDTH, "hidden_dim": HIDDEN, "n_layers": 2, "n_heads": 2}
_GPT2 = {"n_embd": WIDTH, "n_inner": HIDDEN, "n_layer": 2, "n_head": 2, "n_positions": 16}
_IMAGE = {"image_size": 8, "patch_size": 4, "num_labels": 4}

BERT = Family(
    "bert", _bert_like("BertForMaskedLM", "BertConfig"), "pair", "gelu", "bert.encoder.layer.0"
)
DISTILBERT = Family(
    "distilbert",
    _bert_like("DistilBertForMaskedLM", "DistilBertConfig", **_DISTIL),
    "mlp",
    "gelu",
    "distilbert.transformer.layer.0.ffn",
)
ROBERTA = Family(
    "roberta",
    _bert_like("RobertaForMaskedLM", "RobertaConfig"),
    "pair",
    "gelu",
    "roberta.encoder.layer.0",
)
VIT = Family(
    "vit",
    _bert_like("ViTForImageClassification", "ViTConfig", **_IMAGE),
    "mlp",
    "gelu",
    "vit.layers.0.mlp",
    images=True,
)
GPT2 = Family(
    "gpt2",
    _bert_like("GPT2LMHeadModel", "GPT2Config", **_GPT2),
    "mlp",
    "gelu_tanh",
    "transformer.h.0.mlp",
)
LLAMA = Family(
    "llama",
    _bert_like("LlamaForCausalLM", "LlamaConfig"),
    "gated",
    "silu",
    "model.layers.0.mlp",
)
MISTRAL = Family(
    "mistral",
    _bert_like("MistralForCausalLM", "MistralConfig", num_key_value_heads=1),
    "gated",
    "silu",
    "model.layers.0.mlp",
)
ENCODER = Family("encoder", _encoder, "mlp", "gelu", "layers.0", ids=False)
SEQUENTIAL = Family("sequential", _sequential, "mlp", "relu", "0", ids=False)

HUGGING_FACE = (BERT, DISTILBERT, ROBERTA, VIT, GPT2, LLAMA, MISTRAL)
FAMILIES = (*HUGGING_FACE, ENCODER, SEQUENTIAL)
