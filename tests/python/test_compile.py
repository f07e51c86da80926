"""torch.compile without graph breaks and with one dynamic trace; torch.export, run again."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from torch_fff import FFF, UltraFFF, hardening_loss

BATCHES = (1, 7, 64, 1000)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Block(nn.Module):
    """A residual model over [batch, sequence, width] with both layers."""

    def __init__(self, **options):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.fff = FFF(16, 4, 16, 3, **options)
        self.ultra = UltraFFF(16, 16, 2, parallel_size=2)

    def forward(self, x):
        x = x + self.fff(self.norm(x))
        return x + self.ultra(x)


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def traces():
    return counters["stats"]["unique_graphs"]


def compiled(model, dynamic=None, backend="aot_eager"):
    return torch.compile(model, fullgraph=True, dynamic=dynamic, backend=backend)


def gradients(model, x, y):
    grads = torch.autograd.grad(y.sin().sum(), [x, *model.parameters()], allow_unused=True)
    return [grad for grad in grads if grad is not None]


@pytest.mark.parametrize("dynamic", [None, True], ids=["plain", "dynamic"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"usage_mode": "hard", "hardening": 0.3, "balance": 0.1},
        {"train_hardened": True, "usage_mode": "soft", "balance": 0.1},
        {"parallel_size": 2, "node_output": True, "master_leaf_width": 3},
    ],
    ids=["soft", "soft with losses", "hard with losses", "all parameters"],
)
def test_training_needs_one_dynamic_trace(options, dynamic):
    torch.manual_seed(0)
    model = Block(**options)
    step = compiled(model, dynamic)
    seen = []
    for batch in BATCHES:
        x = torch.randn(batch, 3, 16, requires_grad=True)
        actual = gradients(model, x, step(x))
        if options.get("usage_mode"):
            usage = model.fff.leaf_usage.clone()
            model.fff.leaf_usage.zero_()
        expected = gradients(model, x, model(x))
        torch.testing.assert_close(actual, expected, **CLOSE)
        if options.get("usage_mode"):
            torch.testing.assert_close(usage, model.fff.leaf_usage, **CLOSE)
            model.fff.leaf_usage.zero_()
        seen.append(traces())
    # torch always makes a trace of its own for a dimension of size 1.
    assert seen == [1, 2, 2, 2]
    assert not counters["graph_break"]


@pytest.mark.parametrize("dynamic", [None, True], ids=["plain", "dynamic"])
@pytest.mark.parametrize("options", [{}, {"parallel_size": 2, "master_leaf_width": 3}])
def test_inference_needs_one_dynamic_trace(options, dynamic):
    torch.manual_seed(0)
    model = Block(**options).eval()
    step = compiled(model, dynamic)
    seen = []
    for batch in BATCHES:
        x = torch.randn(batch, 3, 16)
        with torch.no_grad():
            torch.testing.assert_close(step(x), model(x), **CLOSE)
        seen.append(traces())
    assert seen == [1, 2, 2, 2]
    assert not counters["graph_break"]


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_inductor(training):
    torch.manual_seed(0)
    model = Block(hardening=0.3, usage_mode="hard").train(training)
    step = compiled(model, backend="inductor")
    for batch in (7, 12):
        x = torch.randn(batch, 3, 16, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(
            gradients(model, x, step(x)), gradients(model, x, model(x)), **CLOSE
        )
    assert traces() == 1


def test_randomness_in_training_compiles():
    torch.manual_seed(0)
    options = {"noise": 0.5, "dropout": 0.25, "region_leak": 0.1, "usage_mode": "hard"}
    options |= {"alternates": 1, "min_slope": 0.1}
    for hard in (False, True):
        model = FFF(16, 4, 16, 3, train_hardened=hard, **options)
        compiled(model)(torch.randn(9, 16)).sum().backward()
        assert model.leaf_usage.sum() == 9
    ultra = UltraFFF(16, 16, 2, noise=0.5, alternates=1, routing_gradient="straight_through")
    compiled(ultra)(torch.randn(9, 16)).sum().backward()
    assert ultra.node_weights.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("attribute", "options"),
    [
        ("hardening", {}),
        ("balance", {}),
        ("balance", {"train_hardened": True}),
        ("noise", {"train_hardened": True}),
    ],
)
def test_a_schedule_needs_one_trace_more(attribute, options):
    torch.manual_seed(0)
    model = FFF(16, 4, 16, 3, **options)
    step = compiled(model)
    x = torch.randn(9, 16)
    weights = list(model.parameters())
    seen = []
    for value in (0.5, 0.4, 0.3, 0.2):
        setattr(model, attribute, value)
        actual = torch.autograd.grad(step(x).sin().sum(), weights)
        if attribute != "noise":
            expected = torch.autograd.grad(model(x).sin().sum(), weights)
            torch.testing.assert_close(actual, expected, **CLOSE)
        seen.append(traces())
    assert seen == [1, 2, 2, 2]


def test_hardening_loss_of_a_compiled_model():
    torch.manual_seed(0)
    model = Block()
    step = compiled(model)
    x = torch.randn(7, 3, 16)
    grads = []
    for forward in (step, model):
        y = forward(x)
        loss = y.sin().sum() + 0.3 * hardening_loss(model)
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    torch.testing.assert_close(*grads, **CLOSE)


def test_checkpointing_in_a_compiled_model():
    torch.manual_seed(0)
    model = Block(hardening=0.3, usage_mode="hard")
    x = torch.randn(7, 3, 16, requires_grad=True)
    expected = gradients(model, x, model(x))
    usage = model.fff.leaf_usage.clone()
    model.fff.leaf_usage.zero_()
    step = compiled(lambda x: checkpoint(model, x, use_reentrant=False))
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        torch.testing.assert_close(gradients(model, x, step(x)), expected, **CLOSE)
    torch.testing.assert_close(model.fff.leaf_usage, usage)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_export_runs_again_with_another_batch(training):
    torch.manual_seed(0)
    model = Block().train(training)
    batch = torch.export.Dim("batch", min=2, max=4096)
    shapes = {"x": {0: batch}}
    program = torch.export.export(model, (torch.randn(7, 3, 16),), dynamic_shapes=shapes)
    assert model.fff._node_logits is None  # nothing of the trace stays behind
    exported = program.module()
    for size in (7, 64):
        x = torch.randn(size, 3, 16)
        torch.testing.assert_close(exported(x), model(x), **CLOSE)
    targets = {str(node.target) for node in program.graph.nodes}
    assert "fff.tree.default" in targets
    assert ("fff.leaf_mixture.default" in targets) == training


def test_export_survives_a_file(tmp_path):
    torch.manual_seed(0)
    model = Block().eval()
    shapes = {"x": {0: torch.export.Dim("batch", min=2, max=4096)}}
    program = torch.export.export(model, (torch.randn(7, 3, 16),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "model.pt2")
    x = torch.randn(5, 3, 16)
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(loaded(x), model(x), **CLOSE)
