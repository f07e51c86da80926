"""A small byte-level language model of torch's own transformer layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BYTES = 256


class LanguageModel(nn.Module):
    """bytes [batch, length] -> logits [batch, length, 256] of the next byte."""

    def __init__(self, width: int, heads: int, layers: int, length: int, neurons: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(BYTES, width)
        self.positions = nn.Parameter(torch.randn(length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, neurons, 0.0, "gelu", batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(width)
        self.layers = nn.TransformerEncoder(layer, layers, norm, enable_nested_tensor=False)
        self.head = nn.Linear(width, BYTES)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=x.device)
        hidden = self.bytes(x) + self.positions[:length]
        logits: Tensor = self.head(self.layers(hidden, mask=mask, is_causal=True))
        return logits
