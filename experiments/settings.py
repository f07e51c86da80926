"""Settings, frozen dataclasses of plain values, as JSON, and compared with such JSON."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any


def as_json(value: Any) -> Any:
    """A dataclass is an object with its fields and its "type"."""
    if is_dataclass(value):
        values = {field.name: as_json(getattr(value, field.name)) for field in fields(value)}
        return {"type": type(value).__name__, **values}
    if isinstance(value, dict):
        return {key: as_json(entry) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [as_json(entry) for entry in value]
    return value


def same(value: Any, stored: Any) -> bool:
    """Whether ``stored`` is ``as_json(value)``, but that fields may be missing.

    A field that is not stored had its default value: a setting that is added leaves results valid.
    """
    if not is_dataclass(value):
        return bool(as_json(value) == stored)
    if not isinstance(stored, dict) or stored.get("type") != type(value).__name__:
        return False
    known = {field.name: field.default for field in fields(value)}
    if set(stored) - set(known) - {"type"}:
        return False
    return all(
        same(getattr(value, name), stored[name])
        if name in stored
        else getattr(value, name) == default
        for name, default in known.items()
    )
