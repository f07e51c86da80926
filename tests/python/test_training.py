"""The layers in training loops: checkpointing, accumulation, DDP, autocast, torch.func."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from torch_fff import FFF, UltraFFF, hardening_loss

EXACT = {"rtol": 1e-11, "atol": 1e-12}


def build(**options):
    torch.manual_seed(0)
    return nn.Sequential(
        FFF(6, 3, 8, 3, dtype=torch.float64, **options),
        UltraFFF(8, 5, 2, 2, routing_gradient="straight_through", dtype=torch.float64),
    )


def tokens(count=24):
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    return torch.randn(count, 6, dtype=torch.float64, generator=generator)


def task_loss(y):
    return y.sin().sum(-1).mean()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def explicit_gradients(weight, **options):
    """Of the task loss plus ``weight`` times the hardening loss, added by hand."""
    model, x = build(**options), tokens()
    (task_loss(model(x)) + weight * hardening_loss(model)).backward()
    return gradients(model)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("hard", [False, True])
def test_checkpointing(hard, use_reentrant):
    options = {
        "train_hardened": hard,
        "dropout": 0.25,
        "region_leak": 0.1,
        "noise": 0.5,
        "alternates": 2,
        "hardening": 0.3,
        "balance": 0.1,
        "usage_mode": "hard",
    }
    results = []
    for checkpointed in (False, True):
        model, x = build(**options), tokens().requires_grad_()
        torch.manual_seed(2)
        y = checkpoint(model, x, use_reentrant=use_reentrant) if checkpointed else model(x)
        task_loss(y).backward()
        assert model[0].leaf_usage.sum() == len(x)  # recomputing is not using
        results.append((y, x.grad, gradients(model), model[0].entropy, model[0].leaf_usage))
    torch.testing.assert_close(*results, **EXACT)


def test_hardening_loss_under_checkpointing():
    model, x = build(), tokens()
    y = checkpoint(model, x, use_reentrant=False)
    (task_loss(y) + 0.3 * hardening_loss(model)).backward()
    torch.testing.assert_close(gradients(model), explicit_gradients(0.3), **EXACT)


def test_hardening_loss_refuses_reentrant_checkpointing():
    model, x = build(), tokens().requires_grad_()
    checkpoint(model, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="reentrant"):
        hardening_loss(model)


def test_gradient_accumulation_takes_its_share_of_hardening():
    model, x = build(hardening=0.3 / 4), tokens()
    for part in x.chunk(4):
        (task_loss(model(part)) / 4).backward()
    torch.testing.assert_close(gradients(model), explicit_gradients(0.3), **EXACT)


def _ddp(rank, world_size, rendezvous, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rendezvous, rank=rank, world_size=world_size)
    model = build(hardening=0.3)
    parallel = DistributedDataParallel(model)
    task_loss(parallel(tokens().chunk(world_size)[rank])).backward()
    if rank == 0:
        torch.save(gradients(model), results)
    dist.destroy_process_group()
    # Not by Python's own exit: it now and then aborts when a thread of torch still wants Python.
    os._exit(0)


@pytest.mark.cpu
def test_ddp_averages_the_layers_own_losses(tmp_path):
    results = tmp_path / "gradients.pt"
    mp.spawn(_ddp, (2, f"file://{tmp_path}/rendezvous", results), nprocs=2)
    torch.testing.assert_close(torch.load(results), explicit_gradients(0.3), **EXACT)


@pytest.mark.parametrize("hard", [False, True])
def test_autocast_bfloat16(device, hard):
    options = {"dropout": 0.1, "noise": 0.5, "region_leak": 0.1, "balance": 0.1}
    options |= {"hardening": 0.1, "usage_mode": "hard", "master_leaf_width": 4}
    torch.manual_seed(0)
    model = nn.Sequential(
        FFF(8, 4, 8, 3, train_hardened=hard, parallel_size=2, node_output=True, **options),
        UltraFFF(8, 8, 2, noise=0.5, routing_gradient="straight_through"),
    )
    with torch.autocast(device.type, torch.bfloat16):
        y = model(torch.randn(32, 8))
        assert y.dtype == torch.bfloat16
        loss = y.float().square().mean() + (0 if hard else hardening_loss(model))
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad.dtype == torch.float32
        assert p.grad.isfinite().all()
        assert p.grad.abs().sum() > 0, name
    assert model[0].entropy.dtype == torch.float32
    assert model[0].leaf_usage.sum() == 64


@pytest.mark.parametrize("hard", [False, True])
def test_autocast_is_close_to_float32(device, hard):
    torch.manual_seed(0)
    layer = FFF(16, 8, 8, 2, master_leaf_width=4)
    x = torch.randn(64, 16)
    # On a grid that bfloat16 represents, rounding cannot turn a decision.
    for tensor in (x, layer.node_weights.data, layer.node_biases.data):
        tensor.copy_(tensor.bfloat16())
    expected = layer(x, use_hard_decisions=hard)
    with torch.autocast(device.type, torch.bfloat16):
        actual = layer(x, use_hard_decisions=hard)
    torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("hard", [False, True])
def test_per_sample_gradients_through_torch_func(hard):
    model, x = build(train_hardened=hard, hardening=0.3), tokens(5)
    weights = dict(model.named_parameters())

    def loss(weights, token):
        return task_loss(torch.func.functional_call(model, weights, token.unsqueeze(0)))

    actual = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    for sample in range(5):
        model.zero_grad()
        task_loss(model(x[sample : sample + 1])).backward()
        expected = gradients(model)
        torch.testing.assert_close({k: v[sample] for k, v in actual.items()}, expected, **EXACT)


def test_frozen_decisions_train_the_leaves_alone():
    model, x = build(train_hardened=True), tokens()
    reference = copy.deepcopy(model)
    task_loss(reference(x)).backward()
    for name in ("node_weights", "node_biases"):
        getattr(model[0], name).requires_grad_(False)
    task_loss(model(x)).backward()
    assert model[0].node_weights.grad is None
    torch.testing.assert_close(model[0].w1.grad, reference[0].w1.grad, **EXACT)


def test_training_teaches_a_hard_tree_what_a_linear_layer_cannot_know():
    """Four quadrants with alternating labels: the decisions have to move, not only the leaves."""
    torch.manual_seed(0)
    x = torch.randn(512, 2)
    label = (x[:, 0] * x[:, 1] > 0).long()
    layer = FFF(2, 1, 2, 2, "identity", train_hardened=True, noise=1.0)
    layer.w1.data.zero_()
    layer.w1.requires_grad_(False)  # constant leaves: only routing can separate
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for step in range(200):
        layer.noise = max(0.0, 1 - step / 150)
        optimizer.zero_grad()
        nn.functional.cross_entropy(layer(x), label).backward()
        optimizer.step()
    accuracy = (layer.eval()(x).argmax(-1) == label).float().mean()
    assert accuracy > 0.9
