"""The dense product of soft trees."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_op = torch.ops.fff.linear.default
_transforms_active = torch._C._are_functorch_transforms_active


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear; where ATen's product is not the fastest there is, by our op, for x [tokens, in].

    The op has no rules for autocast and torch.func; ATen's product has.
    """
    if (
        x.dim() == 2
        and x.is_cpu
        and x.dtype == torch.float32
        and not (_transforms_active() or torch.is_autocast_enabled("cpu"))
    ):
        product: Tensor = _op(x, weight, bias)
        return product
    return F.linear(x, weight, bias)
