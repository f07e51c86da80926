"""Replaced models in Hugging Face's format; needs ``transformers`` only where it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ._arguments import reject
from ._blocks import find_feedforward
from ._options import build_layer, layer_options

__all__ = ["load_pretrained"]

_OWNER = "load_pretrained"
_ATTRIBUTE = "torch_fff"  # of a model's config
_WHERE = ("cache_dir", "local_files_only", "revision", "subfolder", "token", "trust_remote_code")


def write_config(model: nn.Module) -> None:
    """Note in a Hugging Face model's config which blocks are replaced, and by what.

    ``config.torch_fff`` is a list of {"layer": ..., "which": names, options...}. Modules without
    such a config, and replacements that are no layers of this package, are passed over.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "save_pretrained"):
        return
    entries: list[dict[str, Any]] = []
    for block in find_feedforward(model):
        options = None if block.replacement is None else layer_options(block.replacement)
        if options is None:
            continue
        for entry in entries:
            if {key: value for key, value in entry.items() if key != "which"} == options:
                entry["which"].append(block.name)
                break
        else:
            entries.append({**options, "which": [block.name]})
    if entries:
        setattr(config, _ATTRIBUTE, entries)
    elif hasattr(config, _ATTRIBUTE):
        delattr(config, _ATTRIBUTE)


def load_pretrained(model_class: Any, path: Any, **arguments: Any) -> Any:
    """Load a replaced model that ``save_pretrained`` wrote: ``from_pretrained``, which alone would
    build dense blocks, with the layers that the model's config tells.

        model.save_pretrained(path)
        model = load_pretrained(AutoModelForMaskedLM, path)

    Args:
        model_class: a model class of ``transformers`` or one of its ``AutoModel`` classes.
        path: folder or repository, as for ``from_pretrained``.
        arguments: passed on to ``from_pretrained``.

    Raises:
        ValueError: the config holds no replacement, or the checkpoint lacks weights of one.
    """
    config = arguments.pop("config", None)
    if config is None:
        from transformers import AutoConfig

        where = {name: arguments[name] for name in _WHERE if name in arguments}
        config = AutoConfig.from_pretrained(path, **where)
    entries = getattr(config, _ATTRIBUTE, None)
    if not entries:
        expected = "a model saved after replace_feedforward: its config has torch_fff"
        reject(_OWNER, "path", expected, str(path))
    concrete = _concrete(model_class, config)

    def replaced_init(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        self.__class__ = concrete  # whose names transformers goes by
        concrete.__init__(self, *args, **kwargs)
        _replace(self, entries, concrete.base_model_prefix + ".")

    # from_pretrained builds the model by itself: it gets a class that replaces as it builds.
    members = {"__init__": replaced_init, "__module__": concrete.__module__}
    replaced: Any = type(concrete.__name__, (concrete,), members)
    with_info = arguments.pop("output_loading_info", False)
    model, info = replaced.from_pretrained(
        path, config=config, output_loading_info=True, **arguments
    )
    ours = [
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if layer_options(module) is not None
        for parameter in module.state_dict()
    ]
    missing = sorted(set(ours) & set(info["missing_keys"]))
    if missing:
        reject(_OWNER, "path", f"a checkpoint with {missing[0]} and all like it", str(path))
    write_config(model)
    return (model, info) if with_info else model


def _concrete(model_class: Any, config: Any) -> Any:
    """The class of the models that ``model_class``, an ``AutoModel`` class perhaps, makes."""
    if not hasattr(model_class, "from_config"):
        return model_class
    with torch.device("meta"):
        return type(model_class.from_config(config))


def _replace(model: nn.Module, entries: Sequence[Mapping[str, Any]], prefix: str) -> None:
    """Replace blocks as the config says; names with or without the base model's ``prefix``."""
    blocks = {block.name: block for block in find_feedforward(model)}
    for entry in entries:
        options = {key: value for key, value in entry.items() if key not in ("layer", "which")}
        for name in entry["which"]:
            names = (name, name.removeprefix(prefix), prefix + name)
            block = next((blocks[name] for name in names if name in blocks), None)
            if block is None:
                reject(_OWNER, "path", f"a model with the block {name}", type(model).__name__)
            weight = block.linear_in
            layer = build_layer(
                _OWNER,
                entry["layer"],
                options,
                block.input_width,
                block.output_width,
                weight.device,
                weight.dtype,
            )
            block.replace_with(layer)
            block.discard()
            # So that transformers does not look for the linear maps it would initialise.
            block.home._is_hf_initialized = True  # type: ignore[assignment]
