"""The feedforward blocks of a model: found by structure, replaced by other modules, restored.

What counts is what a block consists of, not what its class is called:

- ``mlp``: a module with two linear maps, h -> i and i -> h, and an activation (DistilBERT, ViT,
  GPT-2, ``nn.TransformerEncoderLayer``, or an ``nn.Sequential`` of these);
- ``pair``: a module with a linear map h -> i and an activation, and beside it one with a linear map
  i -> h (BERT, RoBERTa);
- ``gated``: a module with three linear maps, two h -> i and one i -> h, and an activation (Llama,
  Mistral).

A replacement sits where the map h -> i was, with identities for the activation and the map i -> h,
so that dropout, residual and norm around them stay. A gated block is replaced as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from ._arguments import reject
from .reference import ACTIVATIONS

_RECORDS = "_feedforward_blocks"  # on a block's home: its replaced blocks by key


@dataclass(frozen=True)
class _Slot:
    """An attribute of a module that changes with the replacement."""

    owner: nn.Module
    name: str
    original: Any
    stand_in: Any = None  # None: a new nn.Identity

    def fill(self, value: Any) -> None:
        current = getattr(self.owner, self.name)
        if isinstance(current, nn.Module) and not isinstance(value, nn.Module):
            delattr(self.owner, self.name)  # modules give way to modules only
        setattr(self.owner, self.name, value)


@dataclass(eq=False)
class Block:
    """One feedforward block.

    name: of the module that holds it, from the model that was searched ("encoder.layer.0").
    kind: "mlp", "pair" or "gated".
    activation: the operators' name, or None for one that they don't know.
    replacement: what stands in for the block, or None.
    """

    name: str
    kind: str
    activation: str | None
    activation_function: Callable[[Tensor], Tensor]
    input_width: int
    intermediate_width: int
    output_width: int
    module_in: nn.Module  # h -> i
    module_out: nn.Module  # i -> h
    module_gate: nn.Module | None  # h -> i, its output goes through the activation
    _home: nn.Module
    _key: str  # of the block among those of its home
    _seat: _Slot  # where the replacement goes
    _idle: list[_Slot]  # what has no work beside it
    _encoders: list[nn.Module]  # nn.TransformerEncoders whose nested tensors would bypass it
    replacement: nn.Module | None = field(default=None)

    @property
    def linear_in(self) -> Tensor:
        """Weight [i, h] of the map to the hidden neurons; of a gated block, the one not gating."""
        return _weight(self.module_in)

    @property
    def bias_in(self) -> Tensor | None:
        """[i]"""
        return cast("Tensor | None", self.module_in.bias)

    @property
    def linear_out(self) -> Tensor:
        """Weight [h, i] of the map from the hidden neurons."""
        return _weight(self.module_out)

    @property
    def bias_out(self) -> Tensor | None:
        """[h]"""
        return cast("Tensor | None", self.module_out.bias)

    @property
    def linear_gate(self) -> Tensor | None:
        """Weight [i, h] of a gated block's gate."""
        return None if self.module_gate is None else _weight(self.module_gate)

    @property
    def bias_gate(self) -> Tensor | None:
        """[i]"""
        return None if self.module_gate is None else cast("Tensor | None", self.module_gate.bias)

    @property
    def entry(self) -> nn.Module:
        """The module whose input is the block's, now: for a forward (pre-)hook.

        What is there while the block is replaced is the replacement.
        """
        return cast(nn.Module, getattr(self._seat.owner, self._seat.name))

    def dense(self, x: Tensor) -> Tensor:
        """The original block's function, [..., h] -> [..., h], without dropout."""
        hidden = self.module_in(x)
        if self.module_gate is None:
            hidden = self.activation_function(hidden)
        else:
            hidden = self.activation_function(self.module_gate(x)) * hidden
        return cast(Tensor, self.module_out(hidden))

    def parameters(self) -> Iterator[nn.Parameter]:
        """Of the original block."""
        for module in (self.module_in, self.module_gate, self.module_out):
            if module is not None:
                yield from module.parameters()

    def replace_with(self, module: nn.Module) -> None:
        """Put ``module``, [..., h] -> [..., h], in the block's place.

        Raises:
            ValueError: the block is replaced already.
        """
        if self.replacement is not None:
            reject("replace_with", "block", f"{self.name} as it was", "a replaced one: restore it")
        self._seat.fill(module)
        for slot in self._idle:
            slot.fill(nn.Identity() if slot.stand_in is None else slot.stand_in)
        self.replacement = module
        self._home.__dict__.setdefault(_RECORDS, {})[self._key] = self
        for encoder in self._encoders:
            encoder.__dict__.setdefault("_used_nested_tensor", encoder.use_nested_tensor)
            encoder.use_nested_tensor = False  # type: ignore[assignment]

    def restore(self) -> None:
        """Put the original modules back, on the replacement's device and in its dtype and mode.

        Does nothing to a block that is not replaced.
        """
        if self.replacement is None:
            return
        for slot in (self._seat, *self._idle):
            if isinstance(slot.original, nn.Module):
                _follow(slot.original, self.replacement)
            slot.fill(slot.original)
        self.replacement = None
        records = self._home.__dict__[_RECORDS]
        del records[self._key]
        if not records:
            del self._home.__dict__[_RECORDS]
        for encoder in self._encoders:
            if not any(_RECORDS in layer.__dict__ for layer in encoder.modules()):
                encoder.use_nested_tensor = encoder.__dict__.pop("_used_nested_tensor")


def find_feedforward(model: nn.Module) -> list[Block]:
    """All feedforward blocks in the order of the model's modules, replaced ones among them."""
    encoders: dict[nn.Module, list[nn.Module]] = {}
    for module in model.modules():
        if hasattr(module, "use_nested_tensor"):  # nn.TransformerEncoder
            for layer in module.modules():
                encoders.setdefault(layer, []).append(module)
    blocks = []
    for name, module in model.named_modules():
        for block in _blocks_of(module, encoders.get(module, [])):
            block.name = ".".join(part for part in (name, block._key) if part)
            blocks.append(block)
    return blocks


def _blocks_of(home: nn.Module, encoders: list[nn.Module]) -> Iterator[Block]:
    """The blocks recorded at ``home``: itself (key ""), and its gated children by name."""
    replaced = home.__dict__.get(_RECORDS, {})
    block = replaced.get("") or _mlp(home, encoders) or _pair(home)
    if block:
        yield block
    for key, child in home.named_children():
        block = replaced.get(key) or _gated(home, key, child)
        if block:
            yield block


def _mlp(module: nn.Module, encoders: list[nn.Module]) -> Block | None:
    linear = _linear_children(module)
    if len(linear) != 2:
        return None
    (name_in, first), (name_out, last) = linear.items()
    activation = _activation_attribute(module)
    if isinstance(module, nn.Sequential):
        activation, between = _between(module, name_in, name_out)
    else:
        between = []
    if activation is None or not _there_and_back(first, last):
        return None
    hidden, width = _weight(first).shape
    others = (p for p in module.parameters() if hidden != width and p.dim() == 1)
    own = {first.bias, last.bias}
    if any(p.numel() == hidden and p not in own for p in others):
        return None  # such as a norm of the hidden neurons
    idle = [_slot(module, name) for name in (activation, name_out, *between)]
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        idle.append(_slot(module, "dropout"))  # of the hidden neurons
    if hasattr(module, "activation_relu_or_gelu"):
        # The fused inference kernel takes the linear maps' weights; for 0 it is not taken.
        idle.append(_slot(module, "activation_relu_or_gelu", 0))
    function = getattr(module, activation)
    seat = _slot(module, name_in)
    return _block("mlp", function, first, last, None, module, "", seat, idle, encoders)


def _pair(module: nn.Module) -> Block | None:
    for one, other in pairwise(module.children()):
        linear_in, linear_out = _linear_children(one), _linear_children(other)
        activation = _activation_attribute(one)
        if len(linear_in) != 1 or len(linear_out) != 1 or activation is None:
            continue
        ((name_in, first),) = linear_in.items()
        ((name_out, last),) = linear_out.items()
        alone = len(list(one.parameters())) == len(list(first.parameters()))
        if not alone or not _there_and_back(first, last):
            continue
        function = getattr(one, activation)
        idle = [_slot(one, activation), _slot(other, name_out)]
        seat = _slot(one, name_in)
        return _block("pair", function, first, last, None, module, "", seat, idle, [])
    return None


def _gated(home: nn.Module, key: str, module: nn.Module) -> Block | None:
    linear = _linear_children(module)
    activation = _activation_attribute(module)
    if len(linear) != 3 or activation is None:
        return None
    own = sum(len(list(child.parameters())) for child in linear.values())
    if own != len(list(module.parameters())):
        return None
    for name_out, last in linear.items():
        inner = {name: child for name, child in linear.items() if name != name_out}
        if all(_there_and_back(child, last) for child in inner.values()):
            # "gate_proj"; in Llama's own code the gate is w1, beside w3.
            name_gate = next((name for name in inner if "gate" in name), min(inner))
            gate = inner.pop(name_gate)
            (first,) = inner.values()
            function = getattr(module, activation)
            seat = _slot(home, key)
            return _block("gated", function, first, last, gate, home, key, seat, [], [])
    return None


def _block(
    kind: str,
    function: Callable[[Tensor], Tensor],
    first: nn.Module,
    last: nn.Module,
    gate: nn.Module | None,
    home: nn.Module,
    key: str,
    seat: _Slot,
    idle: list[_Slot],
    encoders: list[nn.Module],
) -> Block:
    hidden, width = _weight(first).shape
    return Block(
        name="",
        kind=kind,
        activation=recognise_activation(function),
        activation_function=function,
        input_width=width,
        intermediate_width=hidden,
        output_width=len(_weight(last)),
        module_in=first,
        module_out=last,
        module_gate=gate,
        _home=home,
        _key=key,
        _seat=seat,
        _idle=idle,
        _encoders=encoders,
    )


def _slot(owner: nn.Module, name: str, stand_in: Any = None) -> _Slot:
    return _Slot(owner, name, getattr(owner, name), stand_in)


def _linear_children(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_children() if _is_linear(child)}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    """Whether it is GPT-2's Conv1D, a linear map with weight [in, out]."""
    weight = getattr(module, "weight", None)
    return (
        isinstance(weight, Tensor)
        and weight.dim() == 2
        and getattr(module, "nf", None) == weight.shape[1]
    )


def _weight(module: nn.Module) -> Tensor:
    """[out, in]"""
    weight = cast(Tensor, module.weight)
    return weight.T if _is_transposed(module) else weight


def _there_and_back(first: nn.Module, last: nn.Module) -> bool:
    return _weight(first).shape == _weight(last).shape[::-1]


def _activation_attribute(module: nn.Module) -> str | None:
    """The one callable attribute named as an activation, such as ``intermediate_act_fn``."""
    attributes = {**module.__dict__, **dict(module.named_children())}
    names = [
        name
        for name, value in attributes.items()
        if callable(value) and any(part in ("act", "activation") for part in name.split("_"))
    ]
    return names[0] if len(names) == 1 else None


def _between(module: nn.Sequential, first: str, last: str) -> tuple[str | None, list[str]]:
    """In a sequence: the activation between the linear maps, and dropout there."""
    names = [name for name, _ in module.named_children()]
    inner = names[names.index(first) + 1 : names.index(last)]
    dropout = [name for name in inner if isinstance(getattr(module, name), nn.Dropout)]
    rest = [name for name in inner if name not in dropout]
    return (rest[0] if len(rest) == 1 else None), dropout


def recognise_activation(function: Callable[[Tensor], Tensor]) -> str | None:
    """The operators' name of an elementwise function, by what it computes; None if unknown."""
    x = torch.linspace(-30, 30, 601, dtype=torch.float64, device="cpu")
    try:
        with torch.no_grad():
            y = function(x)
    except Exception:  # it may want anything else than plain float64 values
        return None
    for name, activation in ACTIVATIONS.items():
        if y.shape == x.shape and torch.allclose(y.double(), activation(x), rtol=0, atol=1e-6):
            return name
    return None


def _follow(module: nn.Module, leader: nn.Module) -> None:
    parameter = next(leader.parameters(), None)
    if parameter is not None:
        module.to(device=parameter.device, dtype=parameter.dtype)
    module.train(leader.training)
