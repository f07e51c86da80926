"""The benchmark suite itself: that it measures what it says, on cases too small to say anything."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import __main__ as command_line
from benchmarks import commands, gpu, kernels, layers, models, runner
from benchmarks import timing as timing_module
from benchmarks.baselines import BASELINES
from benchmarks.baselines.dense import Dense
from benchmarks.case import NONE, SOFT, STRAIGHT_THROUGH, TRAINING, Case, ModelCase
from benchmarks.check import assert_close
from benchmarks.compare import compare, compare_files
from benchmarks.floors import Floors, best_of
from benchmarks.machine import Machine
from benchmarks.malloc import KEEP
from benchmarks.plots import plot_files
from benchmarks.results import DENSE, OURS, CaseResult, Report
from benchmarks.roofline import floor_seconds
from benchmarks.runner import Options, run_case
from benchmarks.suites import SUITES, select
from benchmarks.tables import put_into, suite_table
from benchmarks.timing import Effort, Timing, measure

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[2]
EFFORT = Effort(rounds=3, turn=1e-4, budget=0.01, limit=5.0)
UNCOMPILED = tuple(name for name in BASELINES if name != "dense-compiled")
GPU_FLOORS = Floors(
    {"float32": 5e13, "tf32": 4e14, "bfloat16": 8e14}, {"L2": 1e13, "DRAM": 4e12}, 4e12, 2e-6
)
GPU_BASELINES = ("dense-eager", "dense-cublaslt", "masked", "batched", "experts")
GPU_MACHINE = Machine("NVIDIA GPU", 132, "sm_90", {"L2": 2**20}, 2**36)
NEURONS = Case("tiny", 3, 7, trees=2, input_width=12, output_width=10)
LEAVES = Case("tiny", 3, 7, leaf_width=3, input_width=12, output_width=10)
MODEL = ModelCase(
    "bert",
    2,
    5,
    depth=3,
    layers=2,
    width=16,
    heads=2,
    vocabulary=50,
    baselines=tuple(name for name in models.CONTENDERS if not name.endswith("-compiled")),
)
FLOORS = Floors(
    {"float32": 1e11, "bfloat16": 2e11}, {"L2": 4e11, "L3": 2e11, "DRAM": 2e10}, 1e10, 2e-6
)
MACHINE = Machine("processor", 2, "AVX512", {"L1": 2**15, "L2": 2**20, "L3": 2**25}, 2**34)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On cases this small threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tokens(case: Case) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(case.tokens, case.input_width)


# --- registry -------------------------------------------------------------------------------------


def test_every_case_has_a_name_of_its_own() -> None:
    names = [case.name for suite in SUITES.values() for case in suite.cases]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_suites_are_consistent(suite) -> None:
    for case in suite.cases:
        assert case.suite == suite.name
        known = models.CONTENDERS if isinstance(case, ModelCase) else BASELINES
        assert set(case.baselines) <= set(known)
        assert set(case.baselines) & set(DENSE), f"{case.name} has no dense baseline"
        assert getattr(case, "memory", False) <= (case.step == TRAINING)
    for plot in suite.plots:
        assert plot.y in ("seconds", "speedup")
        assert all(getattr(case, plot.x) > 0 for case in suite.cases)


def test_readme_has_a_place_for_every_suite() -> None:
    readme = (ROOT / "benchmarks/README.md").read_text()
    for name in ("machine", "gpu-machine", *SUITES):
        assert f"<!-- begin: {name} -->" in readme
        assert f"<!-- end: {name} -->" in readme


def test_patterns_select_suites_globs_and_parts() -> None:
    assert select(["depth"]) == list(SUITES["depth"].cases)
    assert [case.name for case in select(["trees/4x9-t1-*"])] == ["trees/4x9-t1-fp32"]
    assert {case.layers for case in select(["cold12"])} == {12}
    assert select(["no such case"]) == []
    assert len(select([])) == sum(len(suite.cases) for suite in SUITES.values())


def test_widths_are_the_papers() -> None:
    bert = Case("x", 11, 1)
    assert (bert.neurons, bert.visited) == (4095, 12)
    gpt3 = Case("x", 15, 1, input_width=12288, output_width=12288)
    assert (gpt3.neurons, gpt3.visited) == (65535, 16)
    assert (LEAVES.neurons, LEAVES.visited) == (24, 6)


@pytest.mark.parametrize("case", [NEURONS, LEAVES])
def test_counted_weights_are_the_layers(case: Case) -> None:
    matrices = [p for p in layers.build(case).parameters() if p.shape[-1] in (12, 10)]
    biases = case.leaves * case.output_width  # of shape [leaves, out], not counted
    assert case.weight_bytes == 4 * (sum(matrix.numel() for matrix in matrices) - biases)


# --- baselines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [NEURONS, LEAVES], ids=["neurons", "leaves"])
@pytest.mark.parametrize("name", [n for n, b in BASELINES.items() if b.same_function])
def test_baseline_is_the_same_function(name: str, case: Case) -> None:
    baseline = BASELINES[name]
    if baseline.unfit(case):
        assert (name, case) in (("published", NEURONS), ("naive", LEAVES))
        return
    layer, x = layers.build(case), tokens(case)
    with torch.inference_mode():
        torch.testing.assert_close(baseline.build(case, layer, x)(x), layer(x))


@pytest.mark.parametrize("name", ["masked", "batched"])
def test_baseline_has_the_same_gradients(name: str) -> None:
    case = replace(NEURONS, step=TRAINING, routing=NONE)
    layer, x = layers.build(case), tokens(case)
    baseline = BASELINES[name].build(case, layer, x)
    weights = list(layer.parameters())
    actual = torch.autograd.grad(baseline(x).square().sum(), weights)
    torch.testing.assert_close(actual, torch.autograd.grad(layer(x).square().sum(), weights))


def test_published_soft_training_is_the_same_function() -> None:
    case = replace(LEAVES, step=TRAINING, routing=SOFT)
    layer, x = layers.build(case), tokens(case)
    torch.testing.assert_close(BASELINES["published"].build(case, layer, x)(x), layer(x))


@pytest.mark.parametrize("case", [NEURONS, LEAVES], ids=["neurons", "leaves"])
@pytest.mark.parametrize("name", ["dense-eager", "dense-onednn", "narrow-eager", "narrow-onednn"])
def test_dense_baselines_have_the_width_and_function_they_claim(name: str, case: Case) -> None:
    layer, x = layers.build(case), tokens(case)
    width = case.neurons if name.startswith("dense") else case.visited
    with torch.inference_mode():
        actual = BASELINES[name].build(case, layer, x)(x)
        torch.testing.assert_close(actual, Dense(case, width)(x))


def test_onednn_trains_like_the_dense_layer() -> None:
    case = replace(LEAVES, step=TRAINING, routing=SOFT)
    x = tokens(case)
    dense = Dense(case, case.neurons)
    onednn = BASELINES["dense-onednn"].build(case, layers.build(case), x)
    for of in (dense, onednn):
        of(x).square().sum().backward()
    gradients = [[p.grad for p in of.parameters()] for of in (dense, onednn)]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_vectors_are_the_dense_layer() -> None:
    case = replace(NEURONS, tokens=1)
    x = tokens(case)
    with torch.inference_mode():
        actual = BASELINES["dense-vectors"].build(case, layers.build(case), x)(x)
        torch.testing.assert_close(actual, Dense(case, case.neurons)(x))


@pytest.fixture
def epilogue_of_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused product has GELU by tanh on a GPU, and exactly on a CPU."""

    def fused(bias, x, weight, use_gelu):
        pre = torch.addmm(bias, x, weight)
        return F.gelu(pre, approximate="tanh") if use_gelu else torch.relu(pre)

    monkeypatch.setattr(torch, "_addmm_activation", fused)


@pytest.mark.parametrize("case", [NEURONS, LEAVES], ids=["gelu", "relu"])
def test_fused_dense_is_the_dense_layer(case: Case, epilogue_of_gpu: None) -> None:
    case, x = replace(case, device="cuda"), tokens(case)  # which does not say where tensors lie
    module = Dense(case, case.equal_width)
    with torch.inference_mode():
        actual = BASELINES["dense-cublaslt"].build(case, layers.build(case), x)(x)
        torch.testing.assert_close(actual, module(x), rtol=1e-2, atol=1e-3)  # GELU by tanh
    assert case.equal_width == 64


@pytest.mark.parametrize("count", [1, 7, 200])
def test_grouped_experts_are_the_experts(count: int) -> None:
    widths = {"leaf_width": 8, "input_width": 16, "output_width": 24}
    case = replace(LEAVES, tokens=count, dtype="bfloat16", **widths)
    layer, x = layers.build(case), tokens(case).bfloat16()
    with torch.inference_mode():
        expected = BASELINES["experts"].build(case, layer, x)(x)
        grouped = BASELINES["experts"].build(replace(case, device="cuda"), layer, x)
        assert type(grouped).__name__ == "GroupedExperts"
        assert_close("grouped", grouped(x), expected)


@pytest.mark.parametrize("grad", [False, True])
def test_experts_send_every_token_to_the_best_one(grad: bool) -> None:
    layer, x = layers.build(LEAVES), tokens(LEAVES)
    experts = BASELINES["experts"].build(LEAVES, layer, x)
    rows = []
    for token, shares in zip(x, experts.gate(x).softmax(1), strict=True):
        share, e = shares.max(0)
        hidden = torch.relu(layer.w1[e] @ token + layer.b1[e])
        rows.append(share * (hidden @ layer.w2[e] + layer.b2[e]))
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(experts(x), torch.stack(rows))


# --- running --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        NEURONS,
        LEAVES,
        replace(NEURONS, dtype="bfloat16"),
        replace(NEURONS, layers=3, tokens=1),
        replace(NEURONS, step=TRAINING, routing=STRAIGHT_THROUGH),
        replace(LEAVES, step=TRAINING, routing=STRAIGHT_THROUGH),
        replace(LEAVES, step=TRAINING, routing=NONE, tokens=64),
        replace(LEAVES, step=TRAINING, routing=SOFT, memory=True),
    ],
    ids=lambda case: case.name,
)
def test_case_is_checked_and_timed(case: Case) -> None:
    result = run_case(replace(case, baselines=UNCOMPILED), Options(EFFORT))
    assert result.error == ""
    assert result.speedup is not None
    assert result.best_dense in DENSE
    assert set(result.timings) | set(result.skipped) == {OURS, *UNCOMPILED}
    assert "output" in result.deviations
    assert ("grad x" in result.deviations) == (case.step == TRAINING)
    assert all(0 < t.low <= t.median <= t.high for t in result.timings.values())


@pytest.fixture
def host_as_gpu(monkeypatch: pytest.MonkeyPatch, epilogue_of_gpu: None) -> list[int]:
    """Cases of a GPU run on the host: graphs are functions, events the clock. Graphs' lengths."""
    lengths: list[int] = []

    def record(calls, inputs):
        count = max(len(calls), len(inputs))
        sequence = [(calls[i % len(calls)], inputs[i % len(inputs)]) for i in range(count)]
        if any(getattr(call, "gate", None) for call in calls):
            raise RuntimeError("operation not permitted when stream is capturing")
        lengths.append(count)
        return lambda argument: [call(x) for call, x in sequence], count

    monkeypatch.setattr(gpu, "record", record)
    monkeypatch.setattr(gpu, "events", timing_module.wall)
    monkeypatch.setattr(gpu, "settings", lambda case: nullcontext())
    monkeypatch.setattr(gpu, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "machine", lambda: GPU_MACHINE)
    monkeypatch.setattr(gpu, "measure_floors", lambda machine: GPU_FLOORS)
    monkeypatch.setattr(runner, "free_bytes", lambda device: 2**33)
    monkeypatch.setattr(runner, "peak_bytes", lambda call, device: 2**20)
    return lengths


@pytest.mark.parametrize(
    "case",
    [
        NEURONS,
        replace(NEURONS, dtype="tf32"),
        replace(NEURONS, dtype="bfloat16", layers=2),
        LEAVES,
        replace(NEURONS, step=TRAINING, routing=STRAIGHT_THROUGH),
        replace(LEAVES, step=TRAINING, routing=SOFT, memory=True),
    ],
    ids=lambda case: case.name,
)
def test_case_of_a_gpu_is_checked_and_timed(case: Case, host_as_gpu: list[int]) -> None:
    case = replace(case, device="cuda", baselines=GPU_BASELINES)
    result = run_case(case, Options(EFFORT))
    assert result.error == ""
    assert result.best_dense in ("dense-eager", "dense-cublaslt")
    for name, measured in result.timings.items():
        waits = name == "experts" and case.step != TRAINING  # for the sizes of its groups
        assert measured.graph == (not waits)
    assert set(host_as_gpu) == {64}  # inputs beyond the L2 cache, as many as there may be
    assert ("dense-cublaslt" in result.skipped) == (case.step == TRAINING)
    assert ("masked" in result.timings) == (case.dtype == "float32" and case.routing == NONE)


def test_run_on_a_gpu_writes_a_report_and_ends_in_time(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    host_as_gpu: list[int],
) -> None:
    case = replace(NEURONS, suite="gpu-forward", device="cuda", baselines=("dense-eager",))
    other = replace(case, depth=2)
    monkeypatch.setattr(commands, "select", lambda patterns: [NEURONS, case, other])
    monkeypatch.setattr(commands, "GPU", EFFORT)
    out = tmp_path / "report.json"
    assert commands.run([], False, 0, [], out, "cuda") == 0
    report = Report.load(out)
    assert [result.case for result in report.cases] == [case, other]
    assert (report.device, report.machine) == ("cuda", GPU_MACHINE)
    assert report.cases[0].floor > 0
    assert "NVIDIA GPU, sm_90" in suite_table("gpu-forward", report)
    document = "<!-- begin: {0} -->\n<!-- end: {0} -->\n"
    places = document.format("machine") + document.format("gpu-machine")
    first, second = put_into(places, [report]).split("<!-- end: machine -->")
    assert "NVIDIA" not in first
    assert "| NVIDIA GPU, sm_90, " in second
    capsys.readouterr()
    assert commands.run([], False, 0, [], out, "cuda", most_seconds=0) == 0
    assert f"left out after 0 s: {case.name}, {other.name}" in capsys.readouterr().out
    assert Report.load(out).cases == []


@pytest.mark.skipif(gpu.is_available(), reason="is about machines without a GPU")
def test_run_without_a_gpu_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.run(["gpu-forward"], False, 0, [], tmp_path / "report.json", "cuda") == 2
    assert "--device cuda: needs a GPU" in capsys.readouterr().err
    assert run_case(SUITES["gpu-forward"].cases[0], Options(EFFORT)).error == "needs a GPU"


def test_cases_of_a_gpu_are_what_they_say() -> None:
    cases = select(["gpu-forward", "gpu-training"])
    assert all(case.device == "cuda" for case in cases)
    assert all(case.device == "cpu" for case in select([]) if not case.suite.startswith("gpu"))
    wide = next(case for case in cases if case.depth == 15)
    assert (wide.neurons, wide.equal_width) == (65535, 65536)
    assert {case.dtype for case in cases} == {"bfloat16", "float32", "tf32"}
    few = replace(NEURONS, tokens=1, device="cuda")
    assert gpu.input_count(few, GPU_MACHINE) == 64
    assert gpu.input_count(replace(few, tokens=10**6), GPU_MACHINE) == 3


def test_script_of_a_gpu_names_what_there_is() -> None:
    script = ROOT / "benchmarks" / "gpu.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert os.access(script, os.X_OK)
    text = script.read_text()
    names = re.search(r"names=\(([^)]*)\)", text)
    assert names
    for name in names[1].split():
        assert (ROOT / f"tests/python/test_{name}.py").exists()
    for suite in re.findall(r"^measure (\S+)", text, re.MULTILINE):
        assert {case.device for case in SUITES[suite].cases} == {"cuda"}


@pytest.mark.skipif(gpu.is_available(), reason="is about machines without a GPU")
def test_script_without_a_gpu_says_so(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", ROOT / "benchmarks" / "gpu.sh", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs a GPU and a torch with CUDA" in done.stderr


STUB = """#!/bin/sh
echo "$*" >> "$LOG"
case "$*" in
  *"$FAILS"*) exit 3 ;;
  *get_device_capability*) echo 9.0 ;;
  *" run "*) for argument; do case $argument in *.json) echo {} > "$argument" ;; esac; done ;;
esac
"""


@pytest.mark.parametrize(
    ("fails", "status", "last"),
    [
        ("nothing", 0, "plot"),
        ("-m pytest", 1, "plot"),
        ("gpu-forward.json", 1, "plot"),
        ("pip install", 1, "pip"),
    ],
)
def test_stages_of_the_script(tmp_path: Path, fails: str, status: int, last: str) -> None:
    """With a Python that does nothing: a stage that fails ends the build alone."""
    stub, log = tmp_path / "python", tmp_path / "log"
    stub.write_text(STUB)
    stub.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(stub), "LOG": str(log), "FAILS": fails}
    command = ["bash", ROOT / "benchmarks" / "gpu.sh", tmp_path / "results"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    calls = log.read_text().splitlines()
    assert f" {last} " in calls[-1]
    if last == "plot":
        runs = [call for call in calls if " run " in call]
        assert [call.split()[3] for call in runs] == ["gpu-forward", "gpu-training"]
        limits = [float(call.split("--seconds ")[1].split()[0]) for call in runs]
        assert 150 < limits[0] < limits[1] <= 510
        assert (tmp_path / "results" / "gpu.md").exists()


def test_command_line_of_a_gpu() -> None:
    arguments = command_line.parser().parse_args(["run", "--device", "cuda", "--seconds", "90"])
    assert (arguments.device, arguments.seconds) == ("cuda", 90.0)


@pytest.mark.parametrize("case", [NEURONS, replace(NEURONS, step=TRAINING)], ids=["eval", "train"])
def test_wrong_output_is_not_timed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    build = layers.build

    def broken(case: Case, seed: int = 0) -> torch.nn.Module:
        layer = build(case, seed)
        layer.register_forward_hook(lambda module, args, output: 1.01 * output)
        return layer

    monkeypatch.setattr(layers, "build", broken)
    result = run_case(case, Options(EFFORT))
    assert result.error.startswith("Mismatch: output: expected a deviation of at most")
    assert not result.timings


def test_wrong_baseline_fails_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(BASELINES["masked"], build=lambda case, layer, x: torch.nn.Linear(12, 10))
    monkeypatch.setitem(BASELINES, "masked", wrong)
    result = run_case(replace(NEURONS, baselines=("masked",)), Options(EFFORT))
    assert result.error.startswith("Mismatch: masked")


def test_baseline_that_cannot_be_built_is_left_out_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*arguments: object) -> torch.nn.Module:
        raise RuntimeError("no compiler")

    eager = replace(BASELINES["dense-eager"], build=fails)
    onednn = replace(BASELINES["dense-onednn"], needs=lambda case: 2**60)
    monkeypatch.setitem(BASELINES, "dense-eager", eager)
    monkeypatch.setitem(BASELINES, "dense-onednn", onednn)
    case = replace(NEURONS, baselines=("dense-eager", "dense-onednn", "masked"))
    result = run_case(case, Options(EFFORT, frozenset(["masked"])))
    assert result.skipped["dense-eager"] == "RuntimeError: no compiler"
    assert result.skipped["dense-onednn"].startswith("needs 1152921504.6 GB, free are ")
    assert result.skipped["masked"] == "not wanted in this run"
    assert set(result.timings) == {OURS}
    assert result.speedup is None


@pytest.mark.parametrize("case", [MODEL, replace(MODEL, step=TRAINING)], ids=["eval", "train"])
def test_whole_models_are_checked_and_timed(case: ModelCase, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    result = run_case(case, Options(EFFORT))
    assert result.error == ""
    assert set(result.timings) == {OURS, *case.baselines}
    assert {"first output", "last output"} <= set(result.deviations)
    assert ("first grad x" in result.deviations) == (case.step == TRAINING)
    whole = replace(report(1e-5), cases=[result])
    whole.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == whole


def test_whole_models_have_what_they_claim() -> None:
    pytest.importorskip("transformers")
    dense = models.build(MODEL)
    ours, distilbert = models.with_trees(MODEL, dense, 1, 3), models.distilbert(MODEL)
    built = models.Built(MODEL, dense, distilbert, ours, [])
    ids = models.inputs(MODEL)[0]
    weights = {id(parameter) for parameter in dense.parameters()}
    with torch.no_grad():
        expected = built.ours(ids)[0]
        masked = models.CONTENDERS["ours-masked"].build(built)
        torch.testing.assert_close(masked(ids)[0], expected)
        rest = models.CONTENDERS["no-feedforward"].build(built)
    for model in (built.ours, rest):
        assert sum(id(parameter) in weights for parameter in model.parameters()) == 5 + 2 * 12
    assert len(list(rest.parameters())) == 5 + 2 * 12


def test_wrong_blocks_of_a_model_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    build = models.with_trees

    def broken(*arguments: object) -> torch.nn.Module:
        model = build(*arguments)
        last = model.encoder.layer[-1].intermediate.dense
        last.register_forward_hook(lambda module, args, output: 1.01 * output)
        return model

    monkeypatch.setattr(models, "with_trees", broken)
    result = run_case(MODEL, Options(EFFORT))
    assert result.error.startswith("Mismatch: output: expected a deviation of at most")
    assert not result.timings


def test_table_of_models_states_the_limit() -> None:
    timings = {OURS: timing(2e-3), "dense-eager": timing(6e-3), "distilbert": timing(1e-3)}
    timings["no-feedforward"] = timing(1.5e-3)
    whole = replace(report(1.0), cases=[CaseResult(MODEL, timings)])
    line = suite_table("bert", whole).splitlines()[-1]
    assert line.startswith("| 1x3-b2-s5 | 2.00 ms ± 2 % | 6.00 ms | 1.00 ms |")
    assert line.endswith("| 3.00x | **0.50x, slower** | 1.50 ms | 25 % | 4.00x |")


def test_run_writes_a_report_and_tells_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = replace(NEURONS, baselines=("dense-eager",))
    bad = replace(NEURONS, depth=40)  # more memory than there is
    cases = [good]
    monkeypatch.setattr(commands, "measure_floors", lambda caches: FLOORS)
    monkeypatch.setattr(commands, "select", lambda patterns: cases)
    monkeypatch.setattr(commands, "QUICK", EFFORT)
    out = tmp_path / "new" / "report.json"
    assert commands.run([], quick=True, threads=0, skip=[], out=out) == 0
    assert good.name in capsys.readouterr().out
    cases.append(bad)
    assert commands.run([], quick=True, threads=0, skip=[], out=out) == 1
    assert f"{bad.name}: FAILED: needs" in capsys.readouterr().out
    report = Report.load(out)
    assert [result.case for result in report.cases] == cases
    assert report.quick
    assert report.floors == [FLOORS, FLOORS]
    assert commands.run([], quick=True, threads=0, skip=["nonsense"], out=out) == 2


# --- timing ---------------------------------------------------------------------------------------


def test_calls_alternate_and_rotate_over_inputs_and_layers() -> None:
    seen: dict[str, list[int]] = {"a": [], "b0": [], "b1": []}
    calls = {"a": [seen["a"].append], "b": [seen["b0"].append, seen["b1"].append]}
    effort = Effort(rounds=4, turn=1e-6, budget=1.0, limit=1.0)
    timings = measure(calls, range(3), effort)
    assert seen["a"][:6] == [0, 1, 2, 0, 1, 2]
    assert seen["b0"][:3] == [0, 2, 1]
    assert len(seen["b0"]) == len(seen["b1"])
    assert all(timing.rounds == 4 for timing in timings.values())
    assert timings["b"].calls % 2 == 0


def test_medians_tell_slow_from_fast_and_the_limit_holds() -> None:
    def sleeper(seconds: float):
        return [lambda x: time.sleep(seconds)]

    # So far apart that other programs do not bring them together.
    calls = {"fast": sleeper(1e-4), "slow": sleeper(0.1), "endless": sleeper(1)}
    timings = measure(calls, [0], Effort(rounds=3, turn=1e-3, budget=0.1, limit=0.8))
    assert timings["slow"].median > 2 * timings["fast"].median
    assert timings["slow"].median >= 0.1
    assert re.match(r"a call takes [\d.]+ s, the limit is 0.8 s", timings["endless"])


# --- reports --------------------------------------------------------------------------------------


def timing(median: float, spread: float = 0.02) -> Timing:
    return Timing(median, median * (1 - spread), median * (1 + spread), 15, 10, 0.0)


def report(ours: float, dense: float = 1e-3, spread: float = 0.02) -> Report:
    case = Case("forward", 11, 64, baselines=("dense-eager", "masked"))
    timings = {OURS: timing(ours, spread), "dense-eager": timing(dense, spread)}
    skipped = {"masked": "not wanted in this run"}
    result = CaseResult(case, timings, skipped, {"output": 1e-7}, floor=1e-6)
    versions = {"python": "3", "torch": "2", "torch_fff": "0"}
    return Report(
        "2030-01-02T03:04:05+00:00",
        "python -m benchmarks run forward",
        False,
        "kept",
        2,
        versions,
        MACHINE,
        [FLOORS, FLOORS],
        [result],
    )


def test_report_survives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    original = report(1e-5)
    original.save(path)
    assert Report.load(path) == original
    entry = json.loads(path.read_text())["cases"][0]
    assert entry["name"] == "forward/1x11-t64-fp32"
    assert entry["best_dense"] == "dense-eager"
    assert entry["speedup"] == pytest.approx(100)
    assert set(entry["timings"][OURS]) == {
        *("median", "low", "high", "rounds", "calls", "faults", "peak_bytes", "graph")
    }


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema": 0}', '{"schema": 1}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"benchmarks: {path}: "):
        Report.load(path)


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        (report(1e-5), "same"),
        (report(1.2e-5), "SLOWER"),
        (report(0.8e-5), "faster"),
        (report(1.04e-5, spread=0.001), "same"),  # beyond noise, within the tolerance
        (report(1.2e-5, spread=0.3), "same"),  # within noise
        (report(1.5e-5, dense=1.5e-3), "same"),  # a slower machine
        (report(1e-5, dense=0.5e-3), "same"),  # a faster dense layer
    ],
)
def test_compare_tells_regressions_from_noise(after: Report, verdict: str) -> None:
    before = report(1e-5, spread=0.001)
    assert [entry.verdict for entry in compare(before, after, tolerance=0.05)] == [verdict]


def test_compare_fails_for_a_case_that_fails_now_but_not_for_one_left_out() -> None:
    failed, fewer = report(1e-5), report(1e-5)
    failed.cases[0] = CaseResult(failed.cases[0].case, error="Mismatch")
    fewer.cases = []
    assert [entry.verdict for entry in compare(report(1e-5), failed, 0.05)] == ["FAILED"]
    assert [entry.verdict for entry in compare(report(1e-5), fewer, 0.05)] == ["not in both"]


def test_compare_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new, empty = (tmp_path / name for name in ("old.json", "new.json", "empty.json"))
    report(1e-5).save(old)
    report(2e-5).save(new)
    replace(report(1e-5), cases=[]).save(empty)
    assert compare_files(old, old, 0.05) == 0
    assert compare_files(new, old, 0.05) == 0
    assert compare_files(old, empty, 0.05) == 1
    capsys.readouterr()
    command = [sys.executable, "-m", "benchmarks", "compare", str(old), str(new)]
    planted = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert planted.returncode == 1
    assert "SLOWER" in planted.stdout


def test_tables_show_losses_and_fill_their_markers() -> None:
    table = suite_table("forward", report(2e-3))
    assert "| 1x11-t64-fp32 | 2.00 ms ± 2 % | 1.00 ms (eager) | **0.50x, slower** |" in table
    assert "- left out in 1 of the cases: masked: not wanted in this run" in table
    assert suite_table("depth", report(2e-3)) == ""
    document = "a\n<!-- begin: {0} -->\nold\n<!-- end: {0} -->\nb\n"
    filled = put_into(document.format("forward"), [report(2e-3)])
    assert filled == f"a\n<!-- begin: forward -->\n{table}\n<!-- end: forward -->\nb\n"
    assert put_into(document.format("depth"), [report(1.0)]) == document.format("depth")
    assert "| processor, AVX512, 2 threads | 100 | 200 | 400 | 200 | 20.0 |" in put_into(
        document.format("machine"), [report(1.0)]
    )


def test_plots_are_images(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "report.json"
    report(1e-5).save(path)
    images = plot_files([path], tmp_path / "plots")
    assert [image.name for image in images] == ["forward-speedup-tokens.png"]
    assert images[0].read_bytes().startswith(b"\x89PNG")


# --- floors and memory ----------------------------------------------------------------------------


def test_floor_is_the_largest_of_call_arithmetic_and_bytes() -> None:
    def floor(case: Case, floors: Floors = FLOORS) -> float:
        return floor_seconds(case, floors, MACHINE, threads=2)

    assert floor(Case("x", 11, 1)) == FLOORS.call
    # 12 rows in, 12 rows out: the arithmetic of many tokens.
    computing = replace(FLOORS, read=dict.fromkeys(FLOORS.read, 1e15))
    many = floor(Case("x", 11, 16384), computing)
    assert many == pytest.approx(2 * 16384 * 24 * 768 / 1e11)
    assert floor(Case("x", 11, 16384, step=TRAINING), computing) == pytest.approx(3 * many)
    # One token: 21 rows in, 21 rows out, x and y.
    reading = replace(FLOORS, flops={"float32": 1e15}, call=0.0)
    assert floor(Case("x", 20, 1), reading) == pytest.approx((2 * 21 + 2) * 768 * 4 / 4e11)
    # 64 tokens share what is near the root, and need more than the caches beside a large layer.
    few, many = (floor(Case("x", 20, 64, layers=layers), reading) for layers in (1, 1000))
    assert few < 64 * (2 * 21 + 2) * 768 * 4 / 2e11
    assert many == pytest.approx(few * 2e11 / 2e10)


def test_best_floors_are_what_was_possible_once() -> None:
    slow = Floors({"float32": 1.0, "bfloat16": 9e11}, {"L2": 1.0, "L3": 1.0, "DRAM": 1.0}, 1.0, 1.0)
    best = best_of([slow, FLOORS])
    assert best.flops == {"float32": 1e11, "bfloat16": 9e11}
    assert (best.read, best.copy, best.call) == (FLOORS.read, FLOORS.copy, FLOORS.call)


def test_restart_sets_the_allocator_and_keeps_the_arguments() -> None:
    program = (
        "import os, sys; from benchmarks import malloc; malloc.restart_with_kept_memory();"
        "print(malloc.keeps_memory(), *sys.argv[1:])"
    )
    environment = {name: value for name, value in os.environ.items() if name not in KEEP}
    command = [sys.executable, "-c", program, "a", "b c"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.stdout == "True a b c\n"


# --- CUDA kernels ---------------------------------------------------------------------------------

# As cuobjdump writes it, for two architectures; of code and attributes only what is read.
DUMPS = {
    "--dump-resource-usage": """
arch = sm_80
Resource usage:
 Common:
  GLOBAL:0
 Function _ZN3fff4cuda4walkIfEEvT_:
  REG:40 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:528 TEXTURE:0 SURFACE:0 SAMPLER:0
arch = sm_90
Resource usage:
 Function _ZN3fff4cuda4walkIfEEvT_:
  REG:168 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:528 TEXTURE:0 SURFACE:0 SAMPLER:0
""",
    "--dump-elf": """
arch = sm_80
.nv.info
\tAttribute:\tEIATTR_REGCOUNT
.nv.info._ZN3fff4cuda4walkIfEEvT_
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x20 0x4 0x1
arch = sm_90
.nv.info._ZN3fff4cuda4walkIfEEvT_
\tAttribute:\tEIATTR_CBANK_PARAM_SIZE
.nv.callgraph
\tAttribute:\tEIATTR_MAX_THREADS
\tFormat:\tEIFMT_SVAL
\tValue:\t0x1 0x1 0x1
""",
    "--dump-sass": """
arch = sm_80
\t\tFunction : _ZN3fff4cuda4walkIfEEvT_
        /*0000*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0010*/                   LDG.E R4, [R8] ;
arch = sm_90
\t\tFunction : _ZN3fff4cuda4walkIfEEvT_
        /*0000*/                   STL.64 [R1], R4 ;
        /*0010*/                   LDL.64 R4, [R1] ;
""",
}


def test_kernels_are_read_and_spills_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "_dump", lambda option, library: DUMPS[option])
    old, new = kernels.read_kernels(Path())
    assert old.name in ("walk<float>", "_ZN3fff4cuda4walkIfEEvT_")  # without c++filt
    assert (old.architecture, old.registers, old.shared) == ("sm_80", 40, 1024)
    assert (old.threads, old.warps, old.tensor_cores, old.spills) == (128, 48, 1, False)
    assert (new.architecture, new.registers, new.threads) == ("sm_90", 168, 0)
    assert (new.warps, new.stack, new.local, new.spills) == (12, 16, 2, True)
    document = tmp_path / "kernels.md"
    document.write_text("<!-- begin: kernels -->\n<!-- end: kernels -->\n")
    assert kernels.report_kernels(Path(), document) == 1
    assert f"{new.name}, sm_90: uses local memory: 16 bytes" in capsys.readouterr().err
    assert f"| `{new.name}` | sm_90 | 168 | - | 12 | 0 | 16 | 2 | 0 |" in document.read_text()
    monkeypatch.setitem(kernels.MAY_USE_LOCAL_MEMORY, new.name, "a test")
    assert kernels.report_kernels(Path(), document) == 0


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void fff::cuda::walk<fff::cuda::Token<float> >(long)", "walk<Token<float>>"),
        ("void cub::sort<cub::Policy, (int)0>(unsigned int*)", "cub::sort<cub::Policy, (int)0>"),
        ("_Z4walkPf", "_Z4walkPf"),
    ],
)
def test_names_of_kernels_are_short(name: str, short: str) -> None:
    assert kernels.short_name(name) == short


def test_kernels_of_what_is_no_library(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a library, got no such file"):
        kernels.read_kernels(tmp_path / "missing.so")
