"""A loss whose gradient a layer adds in its own backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _AuxiliaryLoss(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(output: Tensor, loss: Tensor) -> Tensor:
        # Not a view: autograd forbids in-place work on a view made by a function, and users write
        # `y += residual`.
        return output.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        return grad_output, torch.ones((), dtype=ctx.dtype, device=grad_output.device)


def attach_loss(owner: str, output: Tensor, loss: Tensor) -> Tensor:
    """``output`` unchanged; its backward gives the scalar ``loss`` the gradient 1."""
    if not loss.requires_grad:
        return output
    if output.dtype == torch.float16:
        raise RuntimeError(
            f"{owner}: hardening and balance: expected float32, float64 or bfloat16, got float16: "
            "its loss scaling cannot reach a loss that the layer adds by itself; add "
            "torch_fff.hardening_loss(model) to the loss instead"
        )
    result: Tensor = _AuxiliaryLoss.apply(output, loss)
    return result
