"""The experiments: what is run, what is kept, and what the tables say of it."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

from examples.data import DEVIATION, MEAN, Images, Split
from examples.text import Text
from experiments import classification, fashion_mnist, language_model
from experiments.balanced import BalancedTree
from experiments.blocks import DenseBlock, ExpertsBlock, TreeBlock
from experiments.experiment import Cell, Experiment
from experiments.gated import GatedTree
from experiments.layers import Dense, Leaves, Neurons
from experiments.moe import Experts, balance_loss
from experiments.registry import EXPERIMENTS
from experiments.results import Record
from experiments.runner import in_process, missing, run
from experiments.settings import as_json, same
from experiments.tables import percent
from experiments.training import Recipe, parameters, schedule
from tolerances import assert_close
from torch_fff import FFF, UltraFFF, functional, losses
from torch_fff.recipes import Geometric, Linear, Schedule, Steps


@dataclass(frozen=True)
class Square:
    base: int
    behaviour: str = "return"


def square(settings: Square, seed: int) -> dict[str, float]:
    if settings.behaviour == "raise":
        raise ArithmeticError("no square today")
    if settings.behaviour == "die":
        os._exit(3)
    return {"square": settings.base**2 + seed, "threads": torch.get_num_threads()}


def squares(*settings: Square) -> Experiment:
    cells = tuple(Cell(f"{s.base}", s) for s in settings)
    return Experiment("squares", "", cells, square, lambda results: "", lambda results, path: None)


def record(cell: Cell, seed: int, **figures: float) -> Record:
    return Record(cell.name, as_json(cell.settings), seed, figures, 1.0, "2", "cpu", "2026-01-01")


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> Images:
    """Three classes that the first pixel tells apart."""

    def split(samples: int) -> Split:
        labels = torch.randint(3, (samples,))
        pixels = torch.randn(samples, 6)
        pixels[:, 0] += 4 * (labels - 1)
        return Split(pixels, labels)

    made = Images("random", ("a", "b", "c"), 0, 16, split(640), split(100), split(100))
    monkeypatch.setattr(classification, "_images", lambda centred: made)
    return made


def test_results_are_kept_and_not_computed_again(tmp_path):
    experiment = squares(Square(2), Square(3))
    assert run(experiment, list(experiment.cells), seeds=1, jobs=2, folder=tmp_path) == 0
    lines = [json.loads(line) for line in experiment.path(tmp_path).read_text().splitlines()]
    assert {line["cell"]: line["figures"]["square"] for line in lines} == {"2": 4, "3": 9}
    assert all(line["figures"]["threads"] == 1 for line in lines)

    todo = missing(experiment, list(experiment.cells), 2, tmp_path)
    assert [(cell.name, seed) for cell, seed in todo] == [("2", 1), ("3", 1)]
    changed = squares(Square(2), Square(3, "other"))
    todo = missing(changed, list(changed.cells), 1, tmp_path)
    assert [cell.name for cell, _ in todo] == ["3"]
    assert changed.results(tmp_path).seeds("3") == 0
    assert experiment.results(tmp_path).mean("2", "square") == 4


def test_a_seed_counts_once(tmp_path):
    experiment = squares(Square(2))
    for seed, value in ((0, 1.0), (1, 5.0), (0, 3.0)):
        record(experiment.cells[0], seed, square=value).append_to(experiment.path(tmp_path))
    results = experiment.results(tmp_path)
    assert results.seeds("2") == 2
    assert (results.mean("2", "square"), results.deviation("2", "square")) == (4, 2**0.5)


def test_a_setting_that_is_added_leaves_results_valid():
    cell = Cell("x", Square(2))
    stored = replace(record(cell, 0), settings={"type": "Square", "base": 2})
    assert cell.fits(stored)
    assert not Cell("x", Square(2, "other")).fits(stored)
    assert not cell.fits(replace(stored, settings={**stored.settings, "removed": 1}))


@pytest.mark.parametrize(
    "value", [Linear(1.0, 2.0), Steps((0.0, 1.0), (0.5, 3.0)), {"a": (1, None)}, 0.1]
)
def test_settings_survive_json(value):
    stored = json.loads(json.dumps(as_json(value)))
    assert same(value, stored)
    assert not same(Geometric(1.0, 2.0), stored)


def test_a_run_that_fails_says_why_and_others_go_on(tmp_path):
    experiment = squares(Square(1, "raise"), Square(2))
    assert run(experiment, list(experiment.cells), seeds=1, jobs=1, folder=tmp_path) == 1
    assert experiment.results(tmp_path).seeds("2") == 1
    with pytest.raises(RuntimeError, match="died with exit code 3"):
        in_process(square, Square(1, "die"), 0)


def test_a_broken_line_is_named(tmp_path):
    experiment = squares(Square(2))
    experiment.path(tmp_path).write_text('{"cell": 1}\n')
    with pytest.raises(ValueError, match=r"squares.jsonl: line 1: expected a run's record"):
        experiment.results(tmp_path)


def test_unknown_cells_and_settings_are_refused():
    experiment = EXPERIMENTS["fashion_mnist"]
    assert len(experiment.select("*l=8*ours")) == 5
    assert [cell.name for cell in experiment.select("FF w=16 pub")] == ["FF w=16 published"]
    with pytest.raises(ValueError, match="--only: expected one of"):
        experiment.select("nothing")
    with pytest.raises(ValueError, match="--set: expected one of layer, recipe, epochs"):
        experiment.with_settings({"nothing": 1})
    assert {cell.settings.epochs for cell in experiment.with_settings({"epochs": 1}).cells} == {1}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_cells_are_distinct_and_buildable(name):
    cells = EXPERIMENTS[name].cells
    assert len({cell.name for cell in cells}) == len(cells)
    for cell in cells:
        assert cell.fits(
            replace(record(cell, 0), settings=json.loads(json.dumps(as_json(cell.settings))))
        )


@pytest.mark.parametrize(
    ("layer", "visited", "neurons"),
    [
        (Dense(7), 7, 7),
        (Leaves(8, 4), 12, 128),
        (Leaves(1, 7, trees=2, node_output=True), 16, 2 * 255),
        (Leaves(8, 1, master_leaf_width=8), 17, 24),
        (Neurons(4, 7), 32, 1020),
    ],
)
def test_layers_have_the_widths_they_claim(layer, visited, neurons):
    assert (layer.visited, layer.neurons) == (visited, neurons)
    built = layer.build(5, 3)
    assert built(torch.randn(2, 5)).shape == (2, 3)
    if isinstance(built, UltraFFF):
        rows = len(built.node_outputs)
    elif isinstance(built, FFF):
        leaves = built.w1.shape[0] * built.w1.shape[1]
        rows = leaves + (0 if built.node_outputs is None else len(built.node_outputs))
        rows += built.master_leaf_width
    else:
        rows = built[0].out_features
    assert rows == neurons


@pytest.mark.parametrize(
    ("layer", "recipe"),
    [
        (Dense(8), None),
        (Leaves(2, 3, shared_leaf_base=True), Recipe()),
        (Leaves(2, 3), Recipe("soft", balance=1.0, hardening=3.0, hardening_first=1.0)),
        (Leaves(1, 3, node_output=True), Recipe(alternates=1, region_leak=0.1, splits="median")),
        (Neurons(2, 2), Recipe("none")),
    ],
)
def test_a_run_learns_and_is_a_function_of_its_seed(images, layer, recipe):
    settings = classification.Settings(layer, recipe, epochs=6, batch_size=16, learning_rate=5e-2)
    figures = classification.run(settings, seed=1)
    assert figures["test"] > 0.85
    assert figures["memorisation"] > 0.85
    again = classification.run(settings, seed=1)
    assert {**again, "seconds": 0} == {**figures, "seconds": 0}
    if isinstance(layer, Dense):
        assert "leaves" not in figures
    else:
        assert 0.7 < figures["soft_validation"] <= 1
        assert 0 < figures["entropy"] < 0.7
        assert 1 <= figures["leaves_used"] <= figures["leaves"]


def test_the_chosen_epoch_is_the_best_on_validation(images):
    settings = classification.Settings(Leaves(2, 2), Recipe(), epochs=3, batch_size=16)
    torch.manual_seed(0)
    layer = settings.layer.build(6, 3)
    seen = []
    measure = classification.accuracy

    def watched(model: nn.Module, split: Split) -> float:
        seen.append(measure(model, split))
        return seen[-1]

    classification.accuracy = watched
    try:
        epoch, seconds = classification.train(layer, images, settings)
    finally:
        classification.accuracy = measure
    assert seen[epoch] == max(seen)
    assert measure(layer, images.validation) == max(seen)
    assert 0 < seconds < time.process_time()


def test_schedules():
    layer = FFF(4, 2, 3, 3, train_hardened=True)
    course = schedule(Recipe(slope=4.0), layer)
    course.apply(layer, 0.0)
    assert (layer.slope, layer.noise, layer.balance) == (1, 1, 0.1)
    course.apply(layer, 0.8)
    assert (layer.slope, layer.noise, layer.balance) == (4, 0, 0)
    course = schedule(Recipe("soft", balance=1.0, hardening=3.0, hardening_first=1.0), layer)
    for done, hardening in ((0.4, 1), (0.5, 3)):
        course.apply(layer, done)
        assert layer.hardening * layer.n_nodes == pytest.approx(hardening)
        assert layer.balance == 1


def test_centred_pixels():
    p = torch.linspace(0, 1, 256)
    assert_close(classification.centre_((p - MEAN) / DEVIATION), 2 * p - 1)


def test_fashion_mnist_table_shows_mean_spread_and_paper(tmp_path):
    experiment = EXPERIMENTS["fashion_mnist"]
    cells = {cell.name: cell for cell in experiment.cells}
    for name in ("FFF l=8 w=128 ours", "FFF l=1 w=16 published"):
        for seed, (test, validation) in enumerate(((0.87, 0.9), (0.88, 0.89))):
            figures = {"test": test, "validation": validation, "memorisation": 0.9}
            figures |= {"leaves_used": 15, "leaves": 16}
            record(cells[name], seed, **figures).append_to(experiment.path(tmp_path))
    results = experiment.results(tmp_path)
    assert percent(results, "FFF l=8 w=128 ours", "test") == "87.50 ± 0.71"
    text = experiment.table(results)
    assert "87.50 ± 0.71, best 87.00 (78.4)" in text
    assert "87.50 ± 0.71 (86.1)" in text
    assert "90.00 ± 0.00 (90.5)" in text
    assert "15 of 16" in text
    experiment.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_paper_grid():
    """Leaf l at training width w has depth log2(w / l)."""
    cells = {cell.name: cell.settings.layer for cell in fashion_mnist.cells()}
    assert cells["FFF l=8 w=512 ours"] == Leaves(8, 6, shared_leaf_base=True)
    assert cells["FFF l=1 w=128 ours"] == Leaves(1, 7, node_output=True, shared_leaf_base=True)
    assert cells["FFF l=1 w=128 published"] == Leaves(1, 7)
    assert {f"FF w={width}" for width in (5, 6, 7, 8, 9, 10, 11, 12, 14)} <= set(cells)


def dense_experts(layer: Experts, x: torch.Tensor) -> torch.Tensor:
    """Every expert for every token, those not chosen with a gate of 0."""
    probability = torch.softmax(x @ layer.router.weight.T, -1)
    kept = probability >= probability.topk(layer.active).values[..., -1:]
    gate = probability * kept
    if layer.active > 1:
        gate = gate / gate.sum(-1, keepdim=True)
    hidden = nn.functional.gelu(torch.einsum("...i,eli->...el", x, layer.w1) + layer.b1)
    output = torch.einsum("...el,elo->...eo", hidden, layer.w2) + layer.b2
    return (gate.unsqueeze(-1) * output).sum(-2)


@pytest.mark.parametrize("active", [1, 2, 5])
@pytest.mark.parametrize("tokens", [(40,), (2, 3), (1,), (0,)])
def test_experts_equal_their_dense_definition(active, tokens):
    layer = Experts(6, 3, 4, experts=5, active=active).double()
    x = torch.randn(*tokens, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(*tokens, 4, dtype=torch.float64)
    inputs = {"x": x, **dict(layer.named_parameters())}
    results = []
    for function in (layer, lambda x: dense_experts(layer, x)):
        y = function(x)
        gradients = torch.autograd.grad((weight * y).sum(), list(inputs.values()))
        results.append([y, *gradients])
    for name, ours, dense in zip(("y", *inputs), *results, strict=True):
        assert_close(ours, dense, name=name)


def test_learning_rates_of_what_some_tokens_reach():
    model = nn.Sequential(Experts(4, 2, 4, experts=3), UltraFFF(4, 4, 1, shared_level_base=True))
    options = {"lr": 1.0, "weight_decay": 0.1}
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert [names[p] for p in parameters(model, None, None, **options)] == list(names.values())
    rates = {
        names[p]: group["lr"]
        for group in parameters(model, 0.5, 0.25, **options)
        for p in group["params"]
    }
    expected = {f"0.{name}": 0.25 for name in ("w1", "b1", "w2", "b2")} | {
        "0.router.weight": 1.0,
        "1.node_weights": 0.125,
        "1.node_biases": 0.125,
        "1.node_outputs": 0.25,
        "1.base_weights": 0.5,
        "1.base_biases": 0.5,
        "1.base_outputs": 1.0,
    }
    assert rates == expected
    alone = parameters(model, None, 0.25, **options)
    assert {group["lr"] for group in alone} == {0.25, 1.0}
    assert sum(len(group["params"]) for group in parameters(model, 0.5, None, **options)) == 11


def test_load_balance_of_experts():
    layer = Experts(4, 2, 3, experts=4).train()
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(4))
    x = torch.tensor([[3.0, 0, 0, 0], [2.0, 1, 0, 0], [0, 0, 1.0, 0]])
    layer(x)
    mean = torch.softmax(x, -1).mean(0)
    assert_close(layer.balance_loss, 4 * (mean[0] * 2 / 3 + mean[2] / 3))
    assert balance_loss(nn.Sequential(layer, nn.ReLU())) == layer.balance_loss
    assert balance_loss(nn.ReLU()) == 0

    layer(50 * torch.eye(4))
    assert_close(layer.balance_loss, torch.tensor(1.0))
    layer(50 * torch.eye(4)[[1, 1, 1]])
    assert_close(layer.balance_loss, torch.tensor(4.0))
    with pytest.raises(ValueError, match="active: expected 1 to 4"):
        Experts(4, 2, 3, experts=4, active=5)


def test_balanced_trees_compute_what_an_fff_does_and_balance_their_leaves():
    options = {"train_hardened": True, "parallel_size": 2, "slope": 3.0}
    layer = BalancedTree(6, 3, 4, 2, balance=1.0, **options).double()
    plain = FFF(6, 3, 4, 2, **options).double()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(40, 6, dtype=torch.float64)
    weight = torch.randn(40, 4, dtype=torch.float64)
    y, expected = layer(x), plain(x)
    assert_close(y, expected)
    scores = plain.slope * (x @ plain.node_weights.T + plain.node_biases).view(40, 2, 3)
    balance = losses.leaf_balance_loss(functional.leaf_mixture(scores))
    assert_close(layer.balance_loss, balance)
    ours = torch.autograd.grad((weight * y).sum(), list(layer.parameters()))
    loss = (weight * expected).sum() + balance
    wanted = torch.autograd.grad(loss, list(plain.parameters()))
    for (name, _), got, want in zip(layer.named_parameters(), ours, wanted, strict=True):
        assert_close(got, want, name=name)
    assert layer.eval()(x).equal(plain.eval()(x))


@pytest.mark.parametrize("tokens", [(40,), (2, 3), (1,), (0,)])
def test_gated_trees_equal_their_dense_definition(tokens):
    layer = GatedTree(6, 3, 4, 2, "gelu", slope=3.0, balance=1.0).double()
    x = torch.randn(*tokens, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(*tokens, 4, dtype=torch.float64)
    inputs = {"x": x, **dict(layer.named_parameters())}

    def dense(x):
        """Every leaf for every token, those not reached with a gate of 0."""
        score = x @ layer.node_weights.T + layer.node_biases
        right = torch.sigmoid(3.0 * score)
        below = [torch.stack([1 - right[..., n], right[..., n]], -1) for n in (1, 2)]
        mixture = torch.cat([(1 - right[..., :1]) * below[0], right[..., :1] * below[1]], -1)
        rounded = (score >= 0).long()
        leaf = 2 * rounded[..., 0] + torch.where(
            score[..., 0] < 0, rounded[..., 1], rounded[..., 2]
        )
        gate = mixture * nn.functional.one_hot(leaf, 4)
        hidden = nn.functional.gelu(torch.einsum("...i,eli->...el", x, layer.w1) + layer.b1)
        output = torch.einsum("...el,elo->...eo", hidden, layer.w2) + layer.b2
        counts = nn.functional.one_hot(leaf.flatten(), 4).sum(0)
        count = max(counts.sum().item(), 1)
        balance = 4 * (counts * mixture.flatten(0, -2).sum(0)).sum() / count**2
        return (gate.unsqueeze(-1) * output).sum(-2), balance

    y = layer(x)  # whose backward adds the gradient of the balance
    ours = [y, layer.balance_loss, *torch.autograd.grad((weight * y).sum(), list(inputs.values()))]
    expected, balance = dense(x)
    loss = (weight * expected).sum() + balance
    results = [expected, balance, *torch.autograd.grad(loss, list(inputs.values()))]
    for name, got, want in zip(("y", "balance", *inputs), ours, results, strict=True):
        assert_close(got, want, name=name)
    assert_close(layer.eval()(x), y)


@pytest.mark.parametrize("cell", language_model.CELLS)
def test_blocks_have_the_widths_they_claim(cell):
    block = language_model.CELLS[cell].block
    layer = block.build(16)
    assert layer(torch.randn(2, 3, 16)).shape == (2, 3, 16)
    rows = sum(
        parameter[..., 0].numel()
        for name, parameter in layer.named_parameters()
        if name in ("w2", "node_outputs")
    )
    assert (rows or layer.first.out_features) == block.neurons
    visited = {"dense 512": 512, "UltraFFF 4x7": 32, "FFF l=32 d=5": 37, "FFF 2x l=8 d=6": 28}
    visited |= {"top-1 of 32 experts of 32": 64, "top-2 of 64 experts of 16": 96}
    assert block.visited == visited.get(cell, block.visited)


@pytest.mark.parametrize(
    ("block", "more"),
    [
        (DenseBlock(16), {}),
        (ExpertsBlock(4, 4, active=2), {"tree_lr_scale": 0.5}),
        (
            TreeBlock("UltraFFF", {"depth": 2, "routing_gradient": "straight_through"}),
            {"schedule": Schedule(slope=Geometric(1.0, 4.0)), "node_lr_scale": 0.5},
        ),
        (TreeBlock("UltraFFF", {"depth": 2, "shared_level_base": True}), {"tree_lr_scale": 0.2}),
        (TreeBlock("FFF", {"depth": 2, "leaf_width": 2, "shared_leaf_base": True}), {}),
        (TreeBlock("BalancedTree", {"depth": 2, "leaf_width": 2, "balance": 0.01}), {}),
        (TreeBlock("GatedTree", {"depth": 2, "leaf_width": 2, "slope": 3.0}), {}),
    ],
)
def test_language_models_learn(monkeypatch, block, more):
    part = torch.tensor(list(b"abcdefgh" * 400), dtype=torch.uint8)
    monkeypatch.setattr(language_model.text, "load", lambda folder: Text("", part, part))
    monkeypatch.setattr(language_model, "EVERY", 10)
    size = {"batch": 8, "length": 8, "width": 16, "heads": 2, "layers": 1, "learning_rate": 3e-2}
    settings = language_model.Settings(block, steps=25, **size, **more)
    figures = language_model.run(settings, seed=0)
    assert figures["losses"][0] > 5
    assert figures["loss"] < 0.5
    assert figures["tokens"] == [0, 640, 1280, 1600]
    assert figures["seconds"] == figures["seconds_then"][-1] >= figures["seconds_then"][1]
    assert language_model.run(settings, seed=0)["losses"] == figures["losses"]


def test_loss_between_validations():
    at = language_model.loss_at
    assert at(1.5, [0.0, 1.0, 2.0], [5.0, 3.0, 1.0]) == 2.0
    assert at(9.0, [0.0, 1.0, 2.0], [5.0, 3.0, 1.0]) == 1.0


def test_language_model_table_measures_between_the_dense_layers(tmp_path):
    experiment = EXPERIMENTS["language_model"]
    losses = {"dense 32": 1.6, "dense 512": 1.4, "UltraFFF 4x7": 1.5}
    for name, loss in losses.items():
        cell = next(cell for cell in experiment.cells if cell.name == name)
        figures = {"loss": loss, "losses": [5.0, loss], "tokens": [0, 100]}
        figures |= {"seconds_then": [0.0, 7.0], "seconds": 7.0, "inference": 0.01}
        record(cell, 0, **figures, parameters=1000).append_to(experiment.path(tmp_path))
    results = experiment.results(tmp_path)
    lines = experiment.table(results).splitlines()
    line = next(line for line in lines if line.startswith("| UltraFFF 4x7 |"))
    assert line == "| UltraFFF 4x7 | 32 | 1020 | 1.500 | 50 % | 7 | 1.500 | 10.0 | 1,000 | 1 |"
    experiment.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_tables_and_plots_of_nothing_and_of_one_run(name, tmp_path):
    experiment = EXPERIMENTS[name]
    results = experiment.results(tmp_path)
    assert "No results yet." in experiment.table(results)
    experiment.plot(results, tmp_path / "empty.png")
    if name.startswith("language_model"):
        return
    cell = experiment.cells[0]
    record(cell, 0, test=0.8765, leaves_used=1, leaves=2).append_to(experiment.path(tmp_path))
    results = experiment.results(tmp_path)
    assert "87.65" in experiment.table(results)
    experiment.plot(results, tmp_path / "plot.png")
