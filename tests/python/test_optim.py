"""LocalSGD and LocalAdam: torch's own when every block is due, blockwise otherwise."""

import copy

import pytest
import torch
from torch import nn

from torch_fff import FFF
from torch_fff.optim import LocalAdam, LocalSGD

pytestmark = pytest.mark.cpu

EXACT = {"rtol": 1e-11, "atol": 1e-13}

SGD = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.01, "maximize": True},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True},
]
ADAM = [
    {"lr": 0.01},
    {"lr": 0.01, "betas": (0.7, 0.9), "eps": 1e-3, "weight_decay": 0.1},
    {"lr": 0.01, "amsgrad": True, "maximize": True},
]
ALL = [(torch.optim.SGD, LocalSGD, options) for options in SGD]
ALL += [(torch.optim.Adam, LocalAdam, options) for options in ADAM]


def parameters():
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((4, 3, 2), (4,))]


def set_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)
        p.grad = grad if p.grad is None else p.grad + grad


@pytest.mark.parametrize(("plain", "local", "options"), ALL)
@pytest.mark.parametrize("by_block", [True, False])
def test_equals_torch_when_every_block_is_due(plain, local, options, by_block):
    expected, actual = parameters(), parameters()
    group = {"params": actual}
    if by_block:
        usage = torch.zeros(4)
        group |= {"usage": usage, "local_batch_size": 5}
    plain, local = plain(expected, **options), local([group], **options)
    for step in range(6):
        for optimizer, params in ((plain, expected), (local, actual)):
            optimizer.zero_grad()
            set_gradients(params, step)
        if by_block:
            usage += 5
        plain.step()
        local.step()
        torch.testing.assert_close(actual, expected, **EXACT)


@pytest.mark.parametrize(("plain", "local", "options"), ALL)
def test_each_block_lives_by_its_own_steps(plain, local, options):
    """A block due in some steps only is where torch's optimizer has it after just those steps."""
    due = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [1, 0, 0, 1]])
    actual, usage = parameters(), torch.zeros(4)
    optimizer = local([{"params": actual, "usage": usage, "local_batch_size": 3}], **options)
    expected = [parameters() for _ in range(4)]
    references = [plain(params, **options) for params in expected]
    for step, ready in enumerate(due):
        optimizer.zero_grad()
        for params in (actual, *expected):
            set_gradients(params, step)
        usage.masked_fill_(ready == 1, 3.0)
        optimizer.step()
        for block in range(4):
            if ready[block]:
                references[block].step()
                references[block].zero_grad()
        for params in zip(actual, *expected, strict=True):
            blocks = [other[block] for block, other in enumerate(params[1:])]
            torch.testing.assert_close(params[0], torch.stack(blocks), **EXACT)


@pytest.mark.parametrize("local", [LocalSGD, LocalAdam])
def test_gradient_and_usage_of_what_was_updated_start_again(local):
    params, usage = parameters(), torch.tensor([9.0, 2.0, 0.0, 10.0])
    before = [p.detach().clone() for p in params]
    optimizer = local([{"params": params, "usage": usage}], lr=0.1, local_batch_size=9)
    set_gradients(params, 0)
    grads = [p.grad.clone() for p in params]
    optimizer.step()
    optimizer.zero_grad()
    due, waiting = [0, 3], [1, 2]
    assert usage.tolist() == [0, 2, 0, 0]
    for p, old, grad in zip(params, before, grads, strict=True):
        assert (p[due] != old[due]).all()
        assert torch.equal(p[waiting], old[waiting])
        assert (p.grad[due] == 0).all()
        assert torch.equal(p.grad[waiting], grad[waiting])


def test_gradients_are_scaled_to_the_local_batch_size():
    params, usage = parameters(), torch.tensor([4.0, 8.0, 12.0, 6.0])
    before = [p.detach().clone() for p in params]
    set_gradients(params, 0)
    grads = [p.grad.clone() for p in params]
    LocalSGD([{"params": params, "usage": usage, "local_batch_size": 4}], lr=0.5).step()
    scale = torch.tensor([1, 1 / 2, 1 / 3, 2 / 3], dtype=torch.float64)
    for p, old, grad in zip(params, before, grads, strict=True):
        rows = scale.view(-1, *(1,) * (p.dim() - 1)).float()
        torch.testing.assert_close(p.detach(), old - 0.5 * rows * grad, rtol=1e-6, atol=1e-6)


def test_groups_may_share_a_usage():
    (a, b), usage = parameters(), torch.full((4,), 3.0)
    before = a.detach().clone(), b.detach().clone()
    groups = [{"params": [p], "usage": usage, "local_batch_size": 3} for p in (a, b)]
    optimizer = LocalSGD(groups, lr=0.1)
    set_gradients((a, b), 0)
    optimizer.step()
    assert (a != before[0]).all()
    assert (b != before[1]).all()
    assert usage.sum() == 0


def test_zero_grad_clears_groups_without_usage():
    for set_to_none in (True, False):
        (a, b), scalar = parameters(), nn.Parameter(torch.ones(()))
        group = {"params": [a], "usage": torch.zeros(4), "local_batch_size": 3}
        optimizer = LocalAdam([group, {"params": [b, scalar]}])
        set_gradients((a, b, scalar), 0)
        optimizer.step()
        assert scalar != 1
        optimizer.zero_grad(set_to_none)
        assert a.grad.abs().sum() > 0
        assert b.grad is None if set_to_none else (b.grad == 0).all()


@pytest.mark.parametrize(("local", "options"), [(LocalSGD, SGD[3]), (LocalAdam, ADAM[2])])
def test_state_dict_resumes_and_keeps_the_layer_s_usage(local, options):
    def build(params):
        usage = torch.zeros(4)
        return usage, local([{"params": params, "usage": usage, "local_batch_size": 3}], **options)

    def steps(params, usage, optimizer, numbers):
        for number in numbers:
            set_gradients(params, number)
            usage += torch.tensor([3, 1, 2, 0])
            optimizer.step()

    params = parameters()
    usage, optimizer = build(params)
    steps(params, usage, optimizer, range(4))
    resumed = copy.deepcopy(params)
    for p, other in zip(params, resumed, strict=True):
        other.grad = p.grad.clone()
    usage2, optimizer2 = build(resumed)
    usage2.copy_(usage)
    optimizer2.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer2.param_groups[0]["usage"] is usage2
    steps(params, usage, optimizer, range(4, 8))
    steps(resumed, usage2, optimizer2, range(4, 8))
    torch.testing.assert_close(resumed, params, rtol=0, atol=0)


def test_closure():
    params = parameters()
    optimizer = LocalSGD(params, lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: LocalSGD(p, lr=-1.0), "LocalSGD: lr: expected a number"),
        (lambda p: LocalSGD(p, 0.1, momentum=-1), "LocalSGD: momentum: expected"),
        (lambda p: LocalSGD(p, 0.1, nesterov=True), "LocalSGD: nesterov: expected momentum > 0"),
        (lambda p: LocalAdam(p, betas=(0.9, 1.0)), r"LocalAdam: betas: expected numbers in \[0, 1"),
        (lambda p: LocalAdam(p, eps=-1.0), "LocalAdam: eps: expected"),
        (lambda p: LocalAdam(p, weight_decay=-1.0), "LocalAdam: weight_decay: expected"),
        (lambda p: LocalAdam(p, local_batch_size=0), "local_batch_size: expected a number > 0"),
        (lambda p: LocalAdam([{"params": p, "usage": 3}]), "LocalAdam: usage: expected a tensor"),
        (
            lambda p: LocalSGD([{"params": p, "usage": torch.zeros(5)}], lr=0.1),
            r"LocalSGD: params: expected 5 rows, as many as usage, got \(4, 3, 2\)",
        ),
    ],
)
def test_wrong_argument(build, message):
    with pytest.raises(ValueError, match=message):
        build(parameters())


@pytest.mark.parametrize("local", [LocalSGD, LocalAdam])
def test_a_layer_trains_with_its_groups(local):
    torch.manual_seed(0)
    layer = FFF(4, 8, 1, 2, usage_mode="hard", train_hardened=True)
    optimizer = local(
        [
            layer.get_node_param_group() | {"local_batch_size": 64},
            layer.get_leaf_param_group() | {"local_batch_size": 16},
        ],
        lr=0.05,
    )
    x = torch.randn(256, 4)
    target = x[:, :1].sign() * x[:, 1:2]
    losses = []
    for batch in (torch.randperm(256)[:32] for _ in range(150)):
        optimizer.zero_grad()
        loss = (layer(x[batch]) - target[batch]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert layer.leaf_usage.max() < 16
