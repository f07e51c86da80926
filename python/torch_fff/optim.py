r"""SGD and Adam with a batch size for each block of a parameter.

In a tree of depth d a leaf sees about 1 / 2^d of the tokens of a batch: its gradient is a sum over
few samples, or none, scaled for many (the shrinking-batch problem of arXiv 2308.14711), and
momentum, moments and weight decay act on it all the same. Here a block (a row of a parameter's
first dimension: a node or a leaf) is left alone until it has been used by ``local_batch_size``
tokens; its gradient accumulates meanwhile. Then it is updated with ``local_batch_size / usage``
times that gradient, as if just ``local_batch_size`` tokens of the same mean had come, and its
gradient and usage start again from 0::

    layer = FFF(..., usage_mode="hard")
    optimizer = LocalSGD(
        [
            layer.get_node_param_group() | {"local_batch_size": 256},
            layer.get_leaf_param_group() | {"local_batch_size": 64},
        ],
        lr=0.2,
    )

A group with "usage" [N] and "local_batch_size" is updated by block; its parameters have N rows. Any
other group is updated in every step, as torch.optim.SGD and torch.optim.Adam do.

Gradients of the first kind belong to the optimizer: ``optimizer.zero_grad()`` leaves them alone,
``model.zero_grad()`` would lose them, and what changes accumulated gradients (float16 loss scaling,
norm clipping) does not fit. Under DDP (with ``broadcast_buffers=False``) sum the usage over the
processes before each step, so that all update the same blocks. Create the optimizer after moving
the model to its device. ``load_state_dict`` keeps the groups' usage tensors: they are buffers of
the layer and come with its state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ._arguments import check_number, reject


class _LocalOptimizer(torch.optim.Optimizer):
    """Which blocks are due, and what happens around an update; a subclass knows the direction."""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        for argument in ("lr", "weight_decay"):
            check_number(type(self).__name__, argument, defaults[argument])
        super().__init__(params, {"usage": None, **defaults})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        owner = type(self).__name__
        group = {**self.defaults, **param_group}
        usage, batch = group["usage"], group["local_batch_size"]
        if batch is not None:
            check_number(owner, "local_batch_size", batch)
            if batch == 0:
                reject(owner, "local_batch_size", "a number > 0", batch)
        if usage is not None:
            if not isinstance(usage, Tensor) or usage.dim() != 1:
                reject(owner, "usage", "a tensor [blocks]", usage)
            params = param_group["params"]
            for p in [params] if isinstance(params, Tensor) else (params := list(params)):
                if p.dim() == 0 or len(p) != len(usage):
                    reject(owner, "params", f"{len(usage)} rows, as many as usage", tuple(p.shape))
            param_group["params"] = params
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the blocks that are due, and reset their gradient and usage."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        updated: list[tuple[Tensor, Tensor]] = []
        for group in self.param_groups:
            due = scale = None
            if _is_local(group):
                usage, batch = group["usage"], group["local_batch_size"]
                due = usage >= batch
                scale = batch / usage.clamp(min=batch)
                updated.append((usage, due))
            for p in group["params"]:
                if p.grad is not None:
                    if p.grad.layout != torch.strided:
                        owner = type(self).__name__
                        reject(owner, "params", "dense gradients", p.grad.layout)
                    self._step_parameter(p, due, scale, group)
        # Groups may share a usage tensor: it is reset when all of them have been updated.
        for usage, due in updated:
            usage.masked_fill_(due, 0)
        return loss

    def _step_parameter(
        self, p: Tensor, due: Tensor | None, scale: Tensor | None, group: dict[str, Any]
    ) -> None:
        state = self.state[p]
        gradient: Any = p.grad
        if due is None or scale is None:  # one block, always due
            due = torch.ones((1,) * p.dim(), dtype=torch.bool, device=p.device)
        else:
            rows = (-1,) + (1,) * (p.dim() - 1)
            due, scale = due.view(rows), scale.view(rows)
            gradient, accumulated = gradient * scale, gradient
            accumulated.masked_fill_(due, 0)
        if group["maximize"]:
            gradient = -gradient
        if group["weight_decay"]:
            gradient = gradient.add(p, alpha=group["weight_decay"])
        if "step" not in state:
            state["step"] = torch.zeros_like(due, dtype=torch.float32)
        state["step"].add_(due)
        direction = self._direction(gradient, due, state, group)
        p.copy_(torch.where(due, p.sub(direction, alpha=group["lr"]), p))

    def _direction(
        self, gradient: Tensor, due: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> Tensor:
        """The step for lr = 1 of the blocks that are due, in their ``state["step"]``-th update."""
        raise NotImplementedError

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of groups without usage; :meth:`step` clears those of the others."""
        for group in self.param_groups:
            if _is_local(group):
                continue
            for p in group["params"]:
                if set_to_none:
                    p.grad = None
                elif p.grad is not None:
                    p.grad.detach_().zero_()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but for the groups' usage tensors, which stay."""
        usages = [group["usage"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, usage in zip(self.param_groups, usages, strict=True):
            group["usage"] = usage


def _is_local(group: dict[str, Any]) -> bool:
    return group["usage"] is not None and group["local_batch_size"] is not None


def _update(state: dict[str, Any], name: str, due: Tensor, value: Tensor) -> Tensor:
    """Replace the blocks of ``state[name]`` that are due."""
    state[name] = torch.where(due, value, state[name])
    result: Tensor = state[name]
    return result


class LocalSGD(_LocalOptimizer):
    """:class:`torch.optim.SGD` by block (see the module).

    Args:
        params: parameters or groups; groups may have "usage" and "local_batch_size".
        lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
        local_batch_size: for groups that have a usage and do not say.

    Raises:
        ValueError: an argument is out of range, or a group's parameters do not have a row per
        usage.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        local_batch_size: float | None = None,
        maximize: bool = False,
    ) -> None:
        check_number("LocalSGD", "momentum", momentum)
        if nesterov and (momentum == 0 or dampening != 0):
            reject("LocalSGD", "nesterov", "momentum > 0 and dampening 0", (momentum, dampening))
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "local_batch_size": local_batch_size,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _direction(
        self, gradient: Tensor, due: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> Tensor:
        momentum = group["momentum"]
        if not momentum:
            return gradient
        velocity = state.setdefault("momentum_buffer", torch.zeros_like(gradient))
        velocity = momentum * velocity + (1 - group["dampening"]) * gradient
        velocity = torch.where(state["step"] == 1, gradient, velocity)
        velocity = _update(state, "momentum_buffer", due, velocity)
        return gradient.add(velocity, alpha=momentum) if group["nesterov"] else velocity


class LocalAdam(_LocalOptimizer):
    """:class:`torch.optim.Adam` by block (see the module); a block's step count is its own.

    Args:
        params: parameters or groups; groups may have "usage" and "local_batch_size".
        lr, betas, eps, weight_decay, amsgrad, maximize: as in torch.optim.Adam.
        local_batch_size: for groups that have a usage and do not say.

    Raises:
        ValueError: an argument is out of range, or a group's parameters do not have a row per
        usage.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        local_batch_size: float | None = None,
        maximize: bool = False,
    ) -> None:
        check_number("LocalAdam", "eps", eps)
        for beta in betas:
            if not 0 <= beta < 1:
                reject("LocalAdam", "betas", "numbers in [0, 1)", betas)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "local_batch_size": local_batch_size,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def _direction(
        self, gradient: Tensor, due: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> Tensor:
        beta1, beta2 = group["betas"]
        first = state.setdefault("exp_avg", torch.zeros_like(gradient))
        first = _update(state, "exp_avg", due, first.lerp(gradient, 1 - beta1))
        second = state.setdefault("exp_avg_sq", torch.zeros_like(gradient))
        second = (beta2 * second).addcmul(gradient, gradient, value=1 - beta2)
        second = _update(state, "exp_avg_sq", due, second)
        if group["amsgrad"]:
            largest = state.setdefault("max_exp_avg_sq", torch.zeros_like(gradient))
            second = _update(state, "max_exp_avg_sq", due, torch.maximum(largest, second))
        # Blocks never updated have step 0 and are not due: keep the corrections finite for them.
        step = state["step"].clamp(min=1).to(gradient.dtype)
        deviation = (second / (1 - beta2**step)).sqrt()
        direction: Tensor = first / (1 - beta1**step) / (deviation + group["eps"])
        return direction
