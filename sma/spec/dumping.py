"""Typed configurations to plain trees."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from enum import Enum
from typing import Any

from sma.errors import SpecError
from sma.plugins.registrations import Registry
from sma.spec.tree import escape
from sma.spec.typed import hints_of, plugin_of


def unload(value: Any, registry: Registry, declared: Any = None) -> Any:
    """The plain tree that :class:`sma.spec.typed.Converter` turns into ``value`` again.

    Args:
        value: a configuration, or a value of one of its fields.
        registry: where the names of the classes are.
        declared: the annotation of the field; a class that it names itself needs no ``type``.

    Raises:
        SpecError: a class is not registered, so that no spec can name it.
    """
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        tree: dict[str, Any] = {}
        plugin = plugin_of(type(value))
        if plugin is not None:
            name = registry.name_of(plugin) if plugin.Config is type(value) else None
            if name is not None:
                tree["type"] = name
            elif not _mentions(declared, type(value)):
                where = f"{type(value).__module__}.{type(value).__qualname__}"
                raise SpecError(f"{where}: its class is not registered, so no spec can name it; see sma.register")
        hints = hints_of(type(value))
        return tree | {key: unload(getattr(value, key), registry, hint) for key, hint in hints.items()}
    if isinstance(value, Mapping):
        return {key: unload(each, registry, declared) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [unload(each, registry, declared) for each in value]
    return escape(value) if isinstance(value, str) else value


def _mentions(annotation: Any, cls: type[Any]) -> bool:
    return annotation is cls or any(_mentions(each, cls) for each in typing.get_args(annotation))
