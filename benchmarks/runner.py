"""Runs cases: build, check, time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import gpu, layers, models
from .baselines import BASELINES
from .case import FORWARD, TRAINING, Case, ModelCase
from .check import Mismatch, Sample, check_baseline, check_forward, check_training
from .layers import Layer
from .memory import free_bytes, peak_bytes
from .results import OURS, CaseResult
from .timing import Call, Effort, Timing, measure, wall

_ROTATED_TOKENS = 4096  # different tokens in turn, so that no contender keeps meeting one path
_MOST_INPUTS = 256
_FEWEST_INPUTS = 3
# There are many contenders, and a call may take seconds, in a quick run, too.
_ROUNDS_OF_MODELS, _BUDGET_OF_MODELS, _LIMIT_OF_MODELS = 7, 6.0, 60.0
_UNWANTED = "not wanted in this run"


@dataclass(frozen=True)
class Options:
    effort: Effort
    skip: frozenset[str] = frozenset()


def run_case(case: Case | ModelCase, options: Options) -> CaseResult:
    """Never raises for what goes wrong within the case: the result tells."""
    result = CaseResult(case)
    whole = isinstance(case, ModelCase)
    if case.device == "cuda" and not gpu.is_available():
        result.error = "needs a GPU"
        return result
    needed = models.needed_bytes(case) if whole else _needed_bytes(case)
    free = free_bytes(case.device)
    if needed > free:
        result.error = f"needs {_gigabytes(needed)}, free are {_gigabytes(free)}"
        return result
    try:
        if whole:
            _run_model(case, options, result)
        else:
            with gpu.settings(case):
                _run(case, options, result)
    except Exception as error:
        result.error = _described(error)
    finally:
        if any(name.endswith("-compiled") for name in case.baselines):
            torch.compiler.reset()
        gc.collect()
    return result


def _run(case: Case, options: Options, result: CaseResult) -> None:
    tested = [layers.build(case, seed) for seed in range(case.layers)]
    inputs = _inputs(case)
    if case.step == TRAINING:
        x, grad = inputs[0]
        result.deviations, samples = check_training(case, tested[0], x, grad)
    else:
        result.deviations, samples = check_forward(case, tested[0], inputs)
    contenders: dict[str, Sequence[nn.Module]] = {OURS: tested}
    for name in case.baselines:
        reason = _unfit(name, case, options)
        if not reason:
            try:
                contenders[name] = _build_baseline(name, case, tested, samples)
            except Mismatch:
                raise
            except Exception as error:
                reason = _described(error)
        if reason:
            result.skipped[name] = reason
    calls: dict[str, Sequence[Call]] = {
        name: _calls(case, modules) for name, modules in contenders.items()
    }
    _time(result, calls, inputs, options.effort)
    if case.memory:
        for name, timing in result.timings.items():
            peak = _peak_bytes(case, calls[name][0], contenders, inputs)
            result.timings[name] = replace(timing, peak_bytes=peak)


def _run_model(case: ModelCase, options: Options, result: CaseResult) -> None:
    inputs = models.inputs(case)
    dense = models.build(case)
    tested = models.with_trees(case, dense, case.trees, case.depth)
    result.deviations, samples = models.check(case, tested, inputs[0])
    built = models.Built(case, dense, models.distilbert(case), tested, samples)
    contenders = {OURS: tested}
    for name in case.baselines:
        if name in options.skip:
            result.skipped[name] = _UNWANTED
            continue
        try:
            contenders[name] = models.CONTENDERS[name].build(built)
        except Mismatch:
            raise
        except Exception as error:
            result.skipped[name] = _described(error)
    effort = replace(
        options.effort,
        rounds=min(options.effort.rounds, _ROUNDS_OF_MODELS),
        budget=min(options.effort.budget, _BUDGET_OF_MODELS),
        limit=_LIMIT_OF_MODELS,
    )
    _time(result, models.calls(case, contenders), inputs, effort)


def _time(
    result: CaseResult, calls: dict[str, Sequence[Call]], inputs: list[Any], effort: Effort
) -> None:
    clock = gpu.events if result.case.device == "cuda" else wall
    recorded: dict[str, int] = {}
    with torch.inference_mode(result.case.step == FORWARD):
        if result.case.device == "cuda":
            calls, recorded = _recorded(calls, inputs)
        outcomes = measure(calls, inputs, effort, clock)
    for name, outcome in outcomes.items():
        if isinstance(outcome, str):
            result.skipped[name] = outcome
        else:
            count = recorded.get(name)
            result.timings[name] = _of_one_call(outcome, count) if count else outcome
    if result.ours is None:
        result.error = result.skipped.pop(OURS)


def _recorded(
    calls: dict[str, Sequence[Call]], inputs: list[Any]
) -> tuple[dict[str, Sequence[Call]], dict[str, int]]:
    """Calls that replay a CUDA graph, and the number of calls in it; others stay as they are."""
    replays: dict[str, Sequence[Call]] = {}
    counts = {}
    for name, own in calls.items():
        try:
            replay, counts[name] = gpu.record(own, inputs)
            replays[name] = [replay]
        except RuntimeError:  # it waits for the GPU, as its user would have to
            replays[name] = own
    return replays, counts


def _of_one_call(timing: Timing, count: int) -> Timing:
    """Of a graph with ``count`` calls."""
    return replace(
        timing,
        median=timing.median / count,
        low=timing.low / count,
        high=timing.high / count,
        calls=timing.calls * count,
        faults=timing.faults / count,
        graph=True,
    )


def _inputs(case: Case) -> list[Any]:
    """x [tokens, in] each; for training (x, grad of the output)."""
    torch.manual_seed(case.tokens)
    count = _input_count(case)

    def normal(width: int) -> list[Tensor]:
        shape = (count, case.tokens, width)
        return list(torch.randn(shape, dtype=case.torch_dtype).unbind())

    if case.step == FORWARD:
        return normal(case.input_width)
    tokens = [x.requires_grad_() for x in normal(case.input_width)]
    return list(zip(tokens, normal(case.output_width), strict=True))


def _input_count(case: Case) -> int:
    if case.device == "cuda":
        return gpu.input_count(case, gpu.machine())
    return min(_MOST_INPUTS, max(_FEWEST_INPUTS, _ROTATED_TOKENS // case.tokens))


def _unfit(name: str, case: Case, options: Options) -> str:
    if name in options.skip:
        return _UNWANTED
    baseline = BASELINES[name]
    reason = baseline.unfit(case)
    needed, free = baseline.needs(case) * case.layers, free_bytes(case.device)
    if not reason and needed > free:
        reason = f"needs {_gigabytes(needed)}, free are {_gigabytes(free)}"
    return reason


def _build_baseline(
    name: str, case: Case, tested: Sequence[Layer], samples: list[Sample]
) -> list[nn.Module]:
    baseline = BASELINES[name]
    built = [baseline.build(case, layer, samples[0].x) for layer in tested]
    if baseline.same_function:
        check_baseline(name, built[0], samples)
    return built


def _calls(case: Case, modules: Sequence[nn.Module]) -> list[Call]:
    if case.step == FORWARD:
        return list(modules)
    return [_training_step(module) for module in modules]


def _training_step(module: nn.Module) -> Call:
    """Gradients of x and of all weights, from none: what a layer in the middle of a model does."""
    parameters = list(module.parameters())

    def step(batch: tuple[Tensor, Tensor]) -> None:
        x, grad = batch
        x.grad = None
        for parameter in parameters:
            parameter.grad = None
        module(x).backward(grad)

    return step


def _peak_bytes(
    case: Case,
    call: Callable[[Any], object],
    contenders: dict[str, Sequence[nn.Module]],
    inputs: list[Any],
) -> int | None:
    """Beyond weights and inputs, which all contenders have alike."""
    for modules in contenders.values():
        for module in modules:
            module.zero_grad()
    for x, _ in inputs:
        x.grad = None
    return peak_bytes(lambda: call(inputs[0]), case.device)


def _needed_bytes(case: Case) -> int:
    """An estimate for the layers, their gradients, the inputs and the reference's copies."""
    copies = 2 if case.step == TRAINING else 1
    reference = 4 / case.itemsize - 1 + (copies - 1) * 4 / case.itemsize
    tokens = (
        _input_count(case) * case.tokens * (case.input_width + case.output_width) * case.itemsize
    )
    return int(case.weight_bytes * (case.layers * copies + reference)) + copies * tokens


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _described(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
