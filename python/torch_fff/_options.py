"""A layer as plain options that JSON can hold: built from them, described by them, counted."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._arguments import check_choice, reject
from .fff import FFF
from .ultra_fff import UltraFFF

LAYERS: dict[str, type[FFF] | type[UltraFFF]] = {"ultra": UltraFFF, "fff": FFF}
_FROM_BLOCK = ("input_width", "output_width", "device", "dtype")
_PRESENCE = {  # parameters that may be None
    "bias": "node_biases",
    "node_output": "node_outputs",
    "output_bias": "output_bias",
}


def build_layer(
    owner: str,
    layer: str,
    options: Mapping[str, Any],
    input_width: int,
    output_width: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> FFF | UltraFFF:
    """``layer`` is "ultra" or "fff", ``options`` are keyword arguments of its class.

    Raises:
        ValueError: an option is unknown, missing or wrong.
    """
    check_choice(owner, "layer", layer, tuple(LAYERS))
    signature = inspect.signature(LAYERS[layer])
    known = [name for name in signature.parameters if name not in _FROM_BLOCK]
    for name in options:
        if name not in known:
            names = ", ".join(known)
            reject(owner, name, f"an option of {LAYERS[layer].__name__} ({names})", options[name])
    for name in known:
        if name not in options and signature.parameters[name].default is inspect.Parameter.empty:
            reject(owner, name, f"a value, as layer is {layer!r}", None)
    return LAYERS[layer](
        input_width=input_width,
        output_width=output_width,
        device=device,
        dtype=dtype,
        **options,
    )


def layer_options(module: nn.Module) -> dict[str, Any] | None:
    """What :func:`build_layer` needs to build the like of ``module``, "layer" included.

    Options at their default are left out, but for the activation. None for other modules.
    """
    for layer, kind in LAYERS.items():
        if type(module) is not kind:
            continue
        options: dict[str, Any] = {"layer": layer}
        for name, parameter in inspect.signature(kind).parameters.items():
            if name in _FROM_BLOCK:
                continue
            if name in _PRESENCE:
                value = getattr(module, _PRESENCE[name]) is not None
            else:
                value = getattr(module, name)
            default = parameter.default
            if name == "node_activation":
                default = module.activation
            if name == "activation" or value != default:
                options[name] = value
        return options
    return None


def parameters_per_token(module: nn.Module) -> int:
    """Parameters that a token touches in inference: all of them, if the module is no tree.

    A shared base counts as folded into the leaves or nodes.
    """
    if not isinstance(module, FFF | UltraFFF):
        return sum(parameter.numel() for parameter in module.parameters())
    return sum(
        _visited_rows(module, name, parameter) * math.prod(parameter.shape[1:])
        for name, parameter in module.named_parameters()
    )


def _visited_rows(layer: FFF | UltraFFF, name: str, parameter: Tensor) -> int:
    if name.startswith("node_"):
        levels = layer.depth if isinstance(layer, FFF) else layer.depth + 1
        return layer.parallel_size * levels
    if name in ("w1", "b1", "w2", "b2"):
        return layer.parallel_size
    if name.startswith("base_"):
        return 0
    return len(parameter) if parameter.dim() else 1  # of the master leaf
