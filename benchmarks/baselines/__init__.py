"""The baselines by name. Dense ones have as many neurons as the trees, narrow ones as many as a
token visits."""

from __future__ import annotations

from . import batched, dense, experts, masked, naive, onednn, published, unpruned
from .baseline import Baseline

BASELINES: dict[str, Baseline] = {
    "dense-eager": Baseline(
        "nn.Linear, activation, nn.Linear",
        dense.eager,
        lambda case: dense.dense_bytes(case, case.equal_width),
    ),
    "dense-compiled": Baseline(
        "the same through torch.compile: max-autotune, in inference freezing",
        dense.compiled,
        onednn.needs,
    ),
    "dense-onednn": Baseline(
        "the same through oneDNN: in inference prepared weights and fused activation",
        onednn.equal,
        onednn.needs,
        onednn.unfit,
    ),
    "dense-cublaslt": Baseline(
        "the same with the activation fused into the first product, by cuBLASLt",
        dense.fused,
        lambda case: dense.dense_bytes(case, case.equal_width),
        dense.fused_unfit,
    ),
    "dense-vectors": Baseline(
        "the same by vector operations only",
        dense.vectors,
        lambda case: 2 * dense.dense_bytes(case, case.equal_width),
        dense.vectors_unfit,
    ),
    "narrow-eager": Baseline(
        "dense layer of equal inference width, eager",
        dense.narrow_eager,
        lambda case: dense.dense_bytes(case, case.visited),
    ),
    "narrow-onednn": Baseline(
        "dense layer of equal inference width, oneDNN",
        onednn.narrow,
        onednn.narrow_needs,
        onednn.unfit,
    ),
    "masked": Baseline(
        "all neurons and a mask, as UltraFastBERT ships",
        masked.build,
        masked.needs,
        masked.unfit,
        same_function=True,
    ),
    "batched": Baseline(
        "rows gathered per token, batched matrix products",
        batched.build,
        batched.needs,
        batched.unfit,
        same_function=True,
    ),
    "naive": Baseline(
        "a CUDA kernel with one thread a token, as UltraFastBERT's",
        naive.build,
        naive.needs,
        naive.unfit,
        same_function=True,
    ),
    "published": Baseline(
        "the PyPI package fastfeedforward",
        published.build,
        published.needs,
        published.unfit,
        same_function=True,
    ),
    "unpruned": Baseline(
        "the same layer in soft training with all its leaves",
        unpruned.build,
        unpruned.needs,
        unpruned.unfit,
    ),
    "experts": Baseline(
        "top-1 mixture of experts of the leaves' width",
        experts.build,
        experts.needs,
        experts.unfit,
    ),
}

__all__ = ["BASELINES", "Baseline"]
