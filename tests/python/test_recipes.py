"""torch_fff.recipes: parameter groups, curves and schedules, trainers' callbacks, folding."""

import builtins
import sys
import types

import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.utils import counters
from torch.nn.utils import parametrize
from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState

from families import BERT, output
from torch_fff import FFF, UltraFFF, load_pretrained, replace_feedforward
from torch_fff.recipes import (
    Geometric,
    Linear,
    Schedule,
    Steps,
    fold,
    lightning_callback,
    parameter_groups,
    published,
    straight_through,
    trainer_callback,
)


def build(shared_level_base=False, **options):
    torch.manual_seed(0)
    ultra = {"routing_gradient": "straight_through", "output_bias": True}
    ultra["shared_level_base"] = shared_level_base
    return nn.Sequential(
        nn.Linear(4, 6),
        nn.LayerNorm(6),
        FFF(6, 2, 6, 2, train_hardened=True, node_output=True, **options),
        nn.Sequential(UltraFFF(6, 3, 1, 2, **ultra)),
    )


# ---- parameter groups ---------------------------------------------------------------------------


def test_groups_hold_every_parameter_once():
    model = build(shared_level_base=True, shared_leaf_base=True, master_leaf_width=2)
    names = {parameter: name for name, parameter in model.named_parameters()}
    scales = {"node_lr_scale": 0.5, "tree_lr_scale": 0.25}
    groups = parameter_groups(model, lr=0.1, weight_decay=0.01, **scales)
    assert [{key: group[key] for key in group if key != "params"} for group in groups] == [
        {"name": "routing", "lr": 0.0125, "weight_decay": 0.0},
        {"name": "shared routing", "lr": 0.05, "weight_decay": 0.0},
        {"name": "tree", "lr": 0.025, "weight_decay": 0.01},
        {"name": "tree biases", "lr": 0.025, "weight_decay": 0.0},
        {"name": "decayed", "lr": 0.1, "weight_decay": 0.01},
        {"name": "undecayed", "lr": 0.1, "weight_decay": 0.0},
    ]
    members = {group["name"]: {names[p] for p in group["params"]} for group in groups}
    assert members == {
        "routing": {
            f"{layer}.{name}" for layer in ("2", "3.0") for name in ("node_weights", "node_biases")
        },
        "shared routing": {"3.0.base_weights", "3.0.base_biases"},
        "tree": {"2.node_outputs", "2.w1", "2.w2", "3.0.node_outputs"},
        "tree biases": {"2.b1", "2.b2"},
        "decayed": {"0.weight", "3.0.base_outputs"}
        | {f"2.{name}" for name in ("base_w1", "base_w2", "master_w1", "master_w2")},
        "undecayed": {"0.bias", "1.weight", "1.bias", "3.0.output_bias"}
        | {f"2.{name}" for name in ("base_b1", "base_b2", "master_b1", "master_b2")}
        | {"2.master_logit"},
    }
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_groups_keep_routing_from_decay_in_a_step():
    model = build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=0.1, weight_decay=0.5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        decayed = name in ("0.weight", "2.node_outputs", "2.w1", "2.w2", "3.0.node_outputs")
        torch.testing.assert_close(p, before[name] * (0.95 if decayed else 1.0))


def test_groups_leave_out_what_is_frozen_and_know_what_is_parametrised():
    model = build()
    model[0].requires_grad_(False)
    model[3].requires_grad_(False)
    for name in ("node_weights", "w1", "b2"):
        parametrize.register_parametrization(model[2], name, nn.Identity())
    groups = parameter_groups(model, lr=0.1, weight_decay=0.0)
    original = model[2].parametrizations
    members = {group["name"]: set(group["params"]) for group in groups}
    assert members["routing"] == {original.node_weights.original, model[2].node_biases}
    assert members["tree"] == {original.w1.original, model[2].w2, model[2].node_outputs}
    assert members["tree biases"] == {model[2].b1, original.b2.original}
    grouped = {p for group in groups for p in group["params"]}
    assert grouped == {p for p in model.parameters() if p.requires_grad}
    assert [group["name"] for group in parameter_groups(nn.ReLU(), lr=1, weight_decay=0)] == []


@pytest.mark.parametrize("argument", ["lr", "weight_decay", "node_lr_scale", "tree_lr_scale"])
def test_groups_refuse(argument):
    arguments = {"lr": 0.1, "weight_decay": 0.0, argument: -1.0}
    with pytest.raises(ValueError, match=f"parameter_groups: {argument}: expected a number in"):
        parameter_groups(build(), **arguments)


# ---- curves and schedules -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("curve", "expected"),  # at 0, 1/4, 1/2, 3/4, 1
    [
        (Linear(1, 0), [1, 0.75, 0.5, 0.25, 0]),
        (Linear(2, 4, until=0.5), [2, 3, 4, 4, 4]),
        (Linear(1, 2, until=0), [2, 2, 2, 2, 2]),
        (Linear(0, 1, stairs=2), [0, 0, 1, 1, 1]),
        (Geometric(1, 16), [1, 2, 4, 8, 16]),
        (Geometric(16, 1, until=0.5, stairs=5), [16, 4, 1, 1, 1]),
        (Steps((0, 1), (0.5, 3)), [1, 1, 3, 3, 3]),
    ],
    ids=repr,
)
def test_curves(curve, expected):
    assert [curve(done / 4) for done in range(5)] == pytest.approx(expected)


def test_stairs_are_that_many_values_of_equal_length():
    curve = Geometric(1, 10, stairs=20)
    values = [curve(i / 2000) for i in range(2000)]
    distinct = sorted(set(values))
    assert len(distinct) == 20
    assert (distinct[0], distinct[-1]) == (1, pytest.approx(10))
    assert {values.count(value) for value in distinct} <= {99, 100, 101}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear("low", 1), "Linear: start: expected a number"),
        (lambda: Linear(0, 1, until=2), r"Linear: until: expected a number in \[0, 1\], got 2"),
        (lambda: Geometric(0, 1), "Geometric: start: expected a number > 0, got 0"),
        (lambda: Geometric(1, 2, stairs=1), "Geometric: stairs: expected an integer >= 2, got 1"),
        (lambda: Steps(), "Steps: steps: expected"),
        (lambda: Steps((0.5, 1)), "Steps: steps: expected"),
        (lambda: Steps((0, 1), (0.7, 2), (0.5, 3)), "Steps: steps: expected"),
        (lambda: Schedule(noise=-1).values(0), "Schedule: noise: expected a number in"),
        (lambda: Schedule(slope=Linear(1, 0)).values(1), "Schedule: slope: expected a number > 0"),
        (lambda: Schedule(prune=1.5).values(0), r"Schedule: prune: expected a number in \[0, 1\]"),
        (lambda: Schedule().values(1.1), r"Schedule: done: expected a number in \[0, 1\], got 1.1"),
        (lambda: Schedule().apply(nn.ReLU(), 0), "apply: model: expected a model with FFF"),
    ],
)
def test_wrong_curves_and_schedules(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_schedule_sets_what_the_layers_have():
    model = build(region_leak=0.2)
    schedule = Schedule(slope=Linear(1, 3), noise=0.5, balance=Steps((0, 0.1), (0.5, 0)))
    assert schedule.apply(model, 0.5) == {"slope": 2, "noise": 0.5, "balance": 0}
    fff, ultra = model[2], model[3][0]
    assert (fff.slope, fff.noise, fff.balance, fff.region_leak) == (2, 0.5, 0, 0.2)
    assert (ultra.slope, ultra.noise) == (2, 0.5)
    assert not hasattr(ultra, "balance")
    assert schedule.apply(fff, 0)["slope"] == 1
    everything = Schedule(**dict.fromkeys(Schedule.__dataclass_fields__, 0.5))
    assert all(getattr(fff, name) == 0.5 for name in everything.apply(model, 0))


def test_ready_made_schedules():
    schedule = straight_through()
    assert schedule.values(0) == {"slope": 1, "noise": 1, "balance": 0.1}
    assert schedule.values(0.3) == pytest.approx(
        {"slope": 10 ** (0.3 / 0.8), "noise": 0.5, "balance": 0.05}
    )
    assert schedule.values(0.8) == {"slope": 10, "noise": 0, "balance": 0}
    schedule = published()
    assert schedule.values(0.4) == {"hardening": 1, "balance": 1}
    assert schedule.values(0.6) == {"hardening": 3, "balance": 1}


def test_stairs_bound_the_compilations():
    torch._dynamo.reset()
    counters.clear()
    layer = FFF(4, 2, 3, 2, train_hardened=True)
    step = torch.compile(layer, fullgraph=True, backend="aot_eager")
    schedule, x = Schedule(slope=Geometric(1, 10, stairs=3)), torch.randn(8, 4)
    for i in range(12):
        schedule.apply(step, i / 12)
        step(x).sum().backward()
    assert layer.slope == pytest.approx(10)
    assert counters["stats"]["unique_graphs"] == 3
    torch._dynamo.reset()


# ---- trainers -----------------------------------------------------------------------------------


def test_hugging_face_callback_follows_the_trainer_s_progress():
    model = build()
    callback = trainer_callback(Schedule(noise=Linear(1, 0)))
    handler = CallbackHandler([callback], model, None, None, None)
    state, control = TrainerState(max_steps=4, global_step=1), TrainerControl()
    seen = []
    while state.global_step < state.max_steps:  # resumed after the first step
        handler.on_step_begin(None, state, control)
        seen.append(model[2].noise)
        state.global_step += 1
    handler.on_train_end(None, state, control)
    assert [*seen, model[3][0].noise] == [0.75, 0.5, 0.25, 0]


class StandInTrainer:
    """What Lightning's trainer tells and calls."""

    def __init__(self, callback, steps):
        self.callback, self.estimated_stepping_batches, self.global_step = callback, steps, 0

    def fit(self, module, batches):
        for index in range(batches):
            self.callback.on_train_batch_start(self, module, None, index)
            yield
            self.global_step += 1
        self.callback.on_train_end(self, module)
        yield


def stand_in_lightning(monkeypatch, name):
    package = types.ModuleType(name)
    package.Callback = type("Callback", (), {})
    for hidden in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, hidden, None)
    if name == "lightning.pytorch":
        monkeypatch.setitem(sys.modules, "lightning", types.ModuleType("lightning"))
    monkeypatch.setitem(sys.modules, name, package)
    return package


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning_callback_follows_the_trainer_s_progress(name, monkeypatch):
    package, model = stand_in_lightning(monkeypatch, name), build()
    callback = lightning_callback(Schedule(noise=Linear(1, 0)))
    assert isinstance(callback, package.Callback)
    seen = [model[2].noise for _ in StandInTrainer(callback, 4).fit(model, 4)]
    assert seen == [1, 0.75, 0.5, 0.25, 0]


def test_callback_needs_a_training_of_known_length(monkeypatch):
    stand_in_lightning(monkeypatch, "pytorch_lightning")
    callback = lightning_callback(straight_through())
    with pytest.raises(ValueError, match="steps: expected a training of known length"):
        next(StandInTrainer(callback, float("inf")).fit(build(), 4))


@pytest.mark.parametrize("make", [trainer_callback, lightning_callback])
def test_callback_names_the_missing_package(make, monkeypatch):
    found = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] in ("transformers", "lightning", "pytorch_lightning"):
            raise ImportError(name)
        return found(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=f"{make.__name__}: expected the package"):
        make(straight_through())


# ---- folding ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        ("fff", {"leaf_width": 3, "shared_leaf_base": True}),
        ("ultra", {"shared_level_base": True}),
    ],
)
def test_folded_hugging_face_model_is_saved_and_loaded(tmp_path, layer, options):
    model, x = BERT.make(), BERT.input()
    replace_feedforward(model, layer, depth=2, **options)
    expected = output(model, x)
    assert fold(model) == 2
    assert fold(model) == 0
    torch.testing.assert_close(output(model, x), expected, rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(transformers.BertForMaskedLM, tmp_path)
    assert loaded.config.torch_fff == model.config.torch_fff
    torch.testing.assert_close(output(loaded, x), expected)
