"""How to train trees: parameter groups, schedules over a training, folding at its end.

The loop stays yours. With ``done`` the share of the training that is over::

    optimizer = torch.optim.AdamW(parameter_groups(model, lr=2e-3, weight_decay=0.01))
    schedule = straight_through()
    for step in range(steps):
        schedule.apply(model, step / steps)
        ...
    fold(model)

or, in a trainer of Hugging Face or of Lightning, ``callbacks=[trainer_callback(schedule)]`` and
``callbacks=[lightning_callback(schedule)]``.

A schedule sets plain attributes of all :class:`FFF` and :class:`UltraFFF` layers of a model. Under
``torch.compile`` each new ``slope``, ``min_slope`` or ``prune`` is a compilation of its own: give
such a curve few values by ``stairs``, no more than ``torch._dynamo.config.recompile_limit`` (8 by
default) allows. The other attributes are free, but that each compiles once when it becomes 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from ._arguments import check_count, check_number, reject
from .fff import FFF
from .hugging_face import write_config
from .ultra_fff import UltraFFF

__all__ = [
    "Geometric",
    "Linear",
    "Schedule",
    "Steps",
    "fold",
    "lightning_callback",
    "parameter_groups",
    "published",
    "straight_through",
    "trainer_callback",
]

Curve = Callable[[float], float]  # of the share of the training that is done, in [0, 1]


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    node_lr_scale: float = 1.0,
    tree_lr_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups for an optimizer of torch.optim of all parameters of ``model`` that want a gradient.

    - "routing": node_weights and node_biases of the model's layers, which of an :class:`UltraFFF`
      are also its neurons; learning rate ``node_lr_scale * tree_lr_scale * lr``, no weight decay,
      which would make decisions softer.
    - "shared routing": base_weights and base_biases of a shared level base; ``node_lr_scale * lr``,
      no weight decay.
    - "tree": node_outputs, w1 and w2; ``tree_lr_scale * lr``.
    - "tree biases": b1 and b2; ``tree_lr_scale * lr``, no weight decay.
    - "undecayed": all other biases, norms and other parameters of at most one dimension, those of a
      shared leaf base (which are as many vectors) among them; ``lr``, no weight decay.
    - "decayed": all others; ``lr``.

    So ``tree_lr_scale`` is for what only some tokens reach, which wants a lower rate than what all
    of them use: in a small language model neuron trees with a shared level base learned best at
    0.2.

    A group is {"name", "params", "lr", "weight_decay"}; empty ones are left out.

    Raises:
        ValueError: an argument is no number >= 0.
    """
    for argument, value in (
        ("lr", lr),
        ("weight_decay", weight_decay),
        ("node_lr_scale", node_lr_scale),
        ("tree_lr_scale", tree_lr_scale),
    ):
        check_number("parameter_groups", argument, value)
    group_of: dict[nn.Parameter, str] = {}
    for layer in model.modules():
        if isinstance(layer, FFF | UltraFFF):
            for name, parameter in layer.named_parameters():
                if group := _group_in_layer(name):
                    group_of[parameter] = group
    scales = {
        "routing": node_lr_scale * tree_lr_scale,
        "shared routing": node_lr_scale,
        "tree": tree_lr_scale,
        "tree biases": tree_lr_scale,
        "decayed": 1.0,
        "undecayed": 1.0,
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in scales}
    for parameter in model.parameters():
        if parameter.requires_grad:
            usual = "undecayed" if parameter.dim() <= 1 else "decayed"
            members[group_of.get(parameter, usual)].append(parameter)
    return [
        {
            "name": name,
            "params": params,
            "lr": lr * scales[name],
            "weight_decay": weight_decay if name in ("tree", "decayed") else 0.0,
        }
        for name, params in members.items()
        if params
    ]


def _group_in_layer(name: str) -> str | None:
    """Of a layer's parameter; None for that of any module's parameter of this dimension."""

    def holds(*weights: str) -> bool:
        # The name of a parametrised or pruned weight holds the original's.
        return any(weight in name for weight in weights)

    if holds("node_weights", "node_biases"):
        return "routing"
    if holds("base_weights", "base_biases"):
        return "shared routing"
    own = not holds("base_", "master_")
    if holds("b1", "b2"):
        return "tree biases" if own else "undecayed"
    return "tree" if own and holds("node_outputs", "w1", "w2") else None


@dataclass(frozen=True)
class Linear:
    """From ``start`` straight to ``end``, which is reached when ``until`` of the training is done.

    With ``stairs=n`` the curve takes just n values, each equally long, ``start`` and ``end`` among
    them.
    """

    start: float
    end: float
    until: float = 1.0
    stairs: int | None = None

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_number(owner, "start", self.start, -math.inf)
        check_number(owner, "end", self.end, -math.inf)
        check_number(owner, "until", self.until, 0.0, 1.0)
        if self.stairs is not None:
            check_count(owner, "stairs", self.stairs, minimum=2)

    def position(self, done: float) -> float:
        """0 at ``start``, 1 at ``end``."""
        position = min(1.0, done / self.until) if self.until else 1.0
        if self.stairs is None:
            return position
        return min(math.floor(position * self.stairs), self.stairs - 1) / (self.stairs - 1)

    def __call__(self, done: float) -> float:
        position = self.position(done)
        return (1 - position) * self.start + position * self.end


@dataclass(frozen=True)
class Geometric(Linear):
    """As :class:`Linear`, but growing by the same factor in equal times: between numbers > 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for argument, value in (("start", self.start), ("end", self.end)):
            if not 0 < value < math.inf:
                reject("Geometric", argument, "a number > 0", value)

    def __call__(self, done: float) -> float:
        position = self.position(done)
        return float(self.start ** (1 - position) * self.end**position)


@dataclass(frozen=True, init=False)
class Steps:
    """One value after the other: ``Steps((0.0, 1), (0.5, 3))`` is 1, and 3 from the middle on.

    Args:
        steps: (share of the training from which on, value), in ascending order from 0.
    """

    steps: tuple[tuple[float, float], ...]

    def __init__(self, *steps: tuple[float, float]) -> None:
        starts = [start for start, _ in steps]
        if not steps or starts[0] != 0 or starts != sorted(set(starts)):
            reject("Steps", "steps", "(start, value) in ascending order, the first from 0", steps)
        for start, value in steps:
            check_number("Steps", "start", start, 0.0, 1.0)
            check_number("Steps", "value", value, -math.inf)
        object.__setattr__(self, "steps", steps)

    def __call__(self, done: float) -> float:
        return [value for start, value in self.steps if start <= done][-1]


@dataclass(frozen=True)
class Schedule:
    """Values of the layers' attributes over a training; what is None is left as it is.

    Each is a number or a curve: a function of the share of the training that is done, such as
    :class:`Linear`, :class:`Geometric` or :class:`Steps`.
    """

    slope: Curve | float | None = None
    noise: Curve | float | None = None
    balance: Curve | float | None = None
    hardening: Curve | float | None = None
    region_leak: Curve | float | None = None
    prune: Curve | float | None = None
    min_slope: Curve | float | None = None

    def values(self, done: float) -> dict[str, float]:
        """The attributes' values when ``done`` of the training, in [0, 1], is over.

        Raises:
            ValueError: ``done`` or a value is out of its range.
        """
        check_number("Schedule", "done", done, 0.0, 1.0)
        values = {}
        for entry in fields(self):
            curve = getattr(self, entry.name)
            if curve is None:
                continue
            value = curve(done) if callable(curve) else curve
            high = 1.0 if entry.name in ("region_leak", "prune", "min_slope") else math.inf
            check_number("Schedule", entry.name, value, 0.0, high)
            if entry.name == "slope" and not value > 0:
                reject("Schedule", "slope", "a number > 0", value)
            values[entry.name] = float(value)
        return values

    def apply(self, model: nn.Module, done: float) -> dict[str, float]:
        """Set the attributes of all layers of ``model``, itself perhaps, that have them.

        An :class:`UltraFFF` has ``slope``, ``noise`` and ``min_slope`` only. Call it before each
        training step; it is cheap.

        Returns:
            The values, for logging.

        Raises:
            ValueError: as :meth:`values`, or the model has no such layer.
        """
        values = self.values(done)
        layers = _layers("Schedule.apply", model)
        for layer in layers:
            for name, value in values.items():
                if hasattr(layer, name):
                    setattr(layer, name, value)
        return values


def straight_through(
    *, slope: float = 10.0, noise: float = 1.0, balance: float = 0.1, stairs: int | None = None
) -> Schedule:
    """The recipe for layers that are trained hard with ``routing_gradient="straight_through"``.

    At ``noise=1`` and slope 1 the first steps sample the soft tree's branches; both the noise and
    the balance loss fade to 0 over 60 % of the training, while the slope grows from 1 to ``slope``
    over 80 %, so that decisions end hard without any hardening loss. It is for layers that learn
    a task by themselves; trees inside a deep network have been better off without.

    Args:
        slope, noise, balance: the slope at the end, the others at the start.
        stairs: number of values the slope takes, for ``torch.compile``; None for one per step.
    """
    return Schedule(
        slope=Geometric(1.0, slope, until=0.8, stairs=stairs),
        noise=Linear(noise, 0.0, until=0.6),
        balance=Linear(balance, 0.0, until=0.6),
    )


def published(
    *, hardening: float = 1.0, then: float = 3.0, switch: float = 0.5, balance: float = 1.0
) -> Schedule:
    """arXiv 2405.16836's two phases for soft training: load balance, and a hardening loss whose
    weight is ``hardening``, and ``then`` once ``switch`` of the training is done.

    With ``hardening=3, balance=0`` it is arXiv 2308.14711's constant weight. For one that grows:
    ``Schedule(hardening=Linear(0, 3))``.
    """
    return Schedule(hardening=Steps((0.0, hardening), (switch, then)), balance=balance)


def fold(model: nn.Module) -> int:
    """Fold the shared bases of all layers of ``model`` (:meth:`FFF.fold`, :meth:`UltraFFF.fold`).

    The config of a Hugging Face model follows, so that ``save_pretrained`` and
    :func:`torch_fff.load_pretrained` fit.

    Returns:
        How many layers had one.
    """
    layers = [
        layer
        for layer in model.modules()
        if (isinstance(layer, FFF) and layer.shared_leaf_base)
        or (isinstance(layer, UltraFFF) and layer.shared_level_base)
    ]
    for layer in layers:
        layer.fold()
    write_config(model)
    return len(layers)


def trainer_callback(schedule: Schedule) -> Any:
    """A ``transformers.TrainerCallback`` that applies ``schedule`` before each optimizer step.

    Progress is the trainer's own, ``state.global_step / state.max_steps``: right after a resumption
    and with gradient accumulation.

    Raises:
        ImportError: ``transformers`` is not installed.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        message = "trainer_callback: expected the package transformers, got none"
        raise ImportError(message) from error

    class ScheduleCallback(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            schedule.apply(kwargs["model"], _share(state.global_step, state.max_steps))

        on_train_end = on_step_begin

    return ScheduleCallback()


def lightning_callback(schedule: Schedule) -> Any:
    """A Lightning ``Callback`` that applies ``schedule`` before each training batch.

    Progress is the trainer's own, ``global_step / estimated_stepping_batches``. The trainer needs
    ``max_steps`` or ``max_epochs``.

    Raises:
        ImportError: neither ``lightning`` nor ``pytorch_lightning`` is installed.
    """
    try:
        from lightning.pytorch import Callback
    except ImportError:
        try:
            from pytorch_lightning import Callback
        except ImportError as error:
            raise ImportError(
                "lightning_callback: expected the package lightning or pytorch_lightning, got none"
            ) from error

    class ScheduleCallback(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            steps = trainer.estimated_stepping_batches
            schedule.apply(pl_module, _share(trainer.global_step, steps))

        on_train_end = on_train_batch_start

    return ScheduleCallback()


def _share(step: int, steps: float) -> float:
    """Of a training; the step after the last is its end."""
    if not 0 < steps < math.inf:
        reject("schedule callback", "steps", "a training of known length (max_steps)", steps)
    return min(1.0, step / steps)


def _layers(owner: str, model: nn.Module) -> list[FFF | UltraFFF]:
    layers = [layer for layer in model.modules() if isinstance(layer, FFF | UltraFFF)]
    if not layers:
        reject(owner, "model", "a model with FFF or UltraFFF layers", type(model).__name__)
    return layers
