"""The hooks that a plugin implements: one, and it only registers."""

from __future__ import annotations

from importlib.resources.abc import Traversable
from typing import Any, Final, Protocol

import pluggy

PROJECT: Final = "sma"
ENTRY_POINT_GROUP: Final = "sma.plugins"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Register(Protocol):
    """What a hook is handed: ``register("name", Class)``, or ``register("name", path)`` for a spec file."""

    def __call__(self, name: str, target: type[Any] | Traversable) -> None: ...


@hookspec
def sma_register(register: Register) -> None:
    """Register classes and specs under names.

    Called once, when the registry is first used. What one plugin registers is taken over together or not at all.

    Args:
        register: call it with a name and a class (its kind follows from its base) or a path of a YAML file.
    """
