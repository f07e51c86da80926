"""Correctness, asserted before anything is timed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .case import Case
from .gpu import tf32
from .layers import Layer, refer

# Relative to the largest value of the expected tensor.
TOLERANCE = {"float32": 1e-4, "tf32": 5e-3, "bfloat16": 3e-2}
# A token with a score closer to 0 than this may rightly go either way.
MARGIN = {"float32": 1e-4, "tf32": 5e-3, "bfloat16": 1e-3}
_ROWS = 256
_ELEMENTS = 2**25  # of the largest tensor in the reference


class Mismatch(AssertionError):
    """Something computes other values than it should."""


@dataclass(frozen=True)
class Sample:
    """Tokens x, some of its ``rows``, and the layer's right output [rows, out] for these."""

    x: Tensor
    rows: Tensor
    output: Tensor


def assert_close(what: str, actual: Tensor, expected: Tensor) -> float:
    """The largest deviation, relative to the largest expected value."""
    if actual.shape != expected.shape:
        raise Mismatch(f"{what}: expected shape {list(expected.shape)}, got {list(actual.shape)}")
    scale = expected.abs().max().double().item()
    difference = (actual.double() - expected.double()).abs().max().item()
    deviation = difference / scale if scale else difference
    tolerance = TOLERANCE[_precision(expected)]
    if not deviation <= tolerance:  # NaN is no match
        raise Mismatch(f"{what}: expected a deviation of at most {tolerance}, got {deviation:.3g}")
    return deviation


def _precision(t: Tensor) -> str:
    """The dtype's name, "tf32" where products of ``t`` may round their factors."""
    if t.dtype == torch.float32:
        rounds = t.is_cuda and torch.backends.cuda.matmul.allow_tf32
        return "tf32" if rounds else "float32"
    return str(t.dtype).removeprefix("torch.")


@torch.inference_mode()
def check_forward(
    case: Case, layer: Layer, inputs: list[Tensor]
) -> tuple[dict[str, float], list[Sample]]:
    """The layer against the reference: deviations, and samples to check baselines with."""
    samples = []
    deviation = 0.0
    tried = 0
    for x in inputs[: max(1, 16 // case.tokens)]:
        count = min(case.tokens, _ROWS, _rows_at_once(case))
        rows = torch.linspace(0, case.tokens - 1, count).long()
        with tf32(False):
            expected, scores = refer(case, layer, x[rows])
        safe = _safe(case, scores, count)
        tried += count
        if safe.any():
            samples.append(Sample(x, rows[safe], expected[safe]))
            actual = layer(x)[rows[safe]]
            deviation = max(deviation, assert_close("output", actual, expected[safe]))
    if 8 * sum(len(sample.rows) for sample in samples) < tried:
        raise Mismatch("output: nearly all tokens are too close to a tie to be compared")
    return {"output": deviation}, samples


def check_training(
    case: Case, layer: Layer, x: Tensor, grad: Tensor
) -> tuple[dict[str, float], list[Sample]]:
    """Output and all gradients against autograd through the reference, over all tokens.

    Where the layer draws branches, the check evaluates all of them.
    """
    weights = dict(layer.named_parameters())
    expected = {name: torch.zeros_like(weight).float() for name, weight in weights.items()}
    outputs, safe, x_grads = [], [], []
    step = _rows_at_once(case)
    for part, part_grad in zip(x.detach().split(step), grad.split(step), strict=True):
        tokens = part.requires_grad_()
        with tf32(False):
            output, scores = refer(case, layer, tokens)
            safe.append(_safe(case, scores, len(tokens)))
            part_grad = part_grad * safe[-1].unsqueeze(-1)
            targets = [tokens, *weights.values()]
            x_grad, *grads = torch.autograd.grad(output, targets, part_grad, allow_unused=True)
        for name, weight_grad in zip(weights, grads, strict=True):
            if weight_grad is not None:
                expected[name] += weight_grad
        outputs.append(output.detach())
        x_grads.append(x_grad)
    # A token near a tie gets no gradient, here and there, so that it changes nobody's.
    kept = torch.cat(safe)
    rows = kept.nonzero().squeeze(-1)
    sample = Sample(x.detach(), rows, torch.cat(outputs)[rows])
    layer.zero_grad()
    tokens = x.detach().requires_grad_()
    drawn, layer.alternates = layer.alternates, None
    output = layer(tokens)
    layer.alternates = drawn
    output.backward(grad * kept.unsqueeze(-1))
    deviations = {
        "output": assert_close("output", output.detach()[rows], sample.output),
        "grad x": assert_close("grad x", _gradient(tokens), torch.cat(x_grads)),
    }
    for name, weight in weights.items():
        key = f"grad {name}"
        wanted = expected[name].to(weight.dtype)
        deviations[key] = assert_close(key, _gradient(weight), wanted)
    layer.zero_grad()
    return deviations, [sample]


def check_baseline(name: str, baseline: nn.Module, samples: list[Sample]) -> None:
    """A baseline that claims to be the same function."""
    for sample in samples:
        with torch.no_grad():
            actual = baseline(sample.x)[sample.rows]
        assert_close(name, actual, sample.output)


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.to_dense()


def _rows_at_once(case: Case) -> int:
    """Tokens that the reference can take at once: it holds every leaf's output of every token."""
    width = max(case.neurons, case.leaves * case.output_width)
    return max(2, _ELEMENTS // width)


def _safe(case: Case, scores: Tensor | None, rows: int) -> Tensor:
    if scores is None:
        return torch.ones(rows, dtype=torch.bool)
    return (scores.detach().abs() > MARGIN[case.dtype]).flatten(1).all(1)
