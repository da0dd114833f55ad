"""Finds the plugins, runs their hook and keeps the process's registry.

Nothing is loaded before the registry is used for the first time. A plugin that raises any error is left out as a whole
and recorded in :meth:`Registry.failures`; the others load. Two variables of the environment change that:
``SMA_STRICT_PLUGINS=1`` raises at the first failure, ``SMA_BLOCK_PLUGINS=a,b`` skips plugins by the name of their entry
point, distribution or module.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources.abc import Traversable
from types import ModuleType
from typing import Any, Final

import pluggy

from sma.errors import PluginError
from sma.plugins import hookspecs
from sma.plugins.registrations import Entry, Failure, Provider, Registry, did_you_mean, make_entry, registered_twice

BUILT_IN: Final = {"sma": "sma.plugin", "sma_modules": "sma_modules.plugin", "sma_models": "sma_models.plugin"}
"""Our own entry points. They are loaded by name where the distribution is not installed (a source tree)."""


class _Process:
    """The registry of this process: None until it is first used."""

    lock: Final = threading.RLock()
    registry: Registry | None = None
    loading: bool = False


def registry() -> Registry:
    """The registry of this process, with all plugins loaded.

    Raises:
        PluginError: a plugin failed and ``SMA_STRICT_PLUGINS`` is set, or a plugin used the registry while loading.
    """
    with _Process.lock:
        if _Process.registry is None:
            if _Process.loading:
                raise PluginError(
                    "the registry was used while plugins are loading; a plugin registers in its sma_register hook"
                )
            _Process.loading = True
            try:
                _Process.registry = load_plugins()
            finally:
                _Process.loading = False
        return _Process.registry


def register(name: str, target: type[Any] | Traversable) -> None:
    """Register a class or a spec file from one's own code, without a package::

        sma.register("mine", MyModule)

    Args:
        name: by which specs speak of it.
        target: a class derived from one of the kinds, or the path of a YAML file.

    Raises:
        PluginError: the name is taken, or the target is no plugin.
    """
    registry().register(name, target)


@contextmanager
def isolated_registry(start: Registry | None = None) -> Iterator[Registry]:
    """Replace the registry of the process for the time of a ``with``; for tests.

    Args:
        start: its contents at the beginning; by default a copy of the present registry, with all plugins loaded.
            The registry given is used itself.
    """
    inner = registry().copy() if start is None else start
    with _Process.lock:
        outer, _Process.registry = _Process.registry, inner
    try:
        yield inner
    finally:
        with _Process.lock:
            _Process.registry = outer


def load_plugins() -> Registry:
    """Load every plugin that is installed into a new registry.

    Raises:
        PluginError: a plugin failed and ``SMA_STRICT_PLUGINS`` is set.
    """
    strict = os.environ.get("SMA_STRICT_PLUGINS", "") not in ("", "0")
    blocked = {name.strip() for name in os.environ.get("SMA_BLOCK_PLUGINS", "").split(",")} - {""}
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    loaded = Registry()
    for provider in discover():
        if blocked.intersection({provider.plugin, provider.module, provider.distribution}):
            continue
        try:
            loaded.commit(_stage(manager, provider))
        except (Exception, SystemExit) as error:  # an error of a plugin's code is recorded below
            message = str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
            if strict:
                raise PluginError(f"{provider}: {message}") from error
            loaded.fail(Failure(provider, message, error))
    return loaded


def discover() -> list[Provider]:
    """The modules named by entry points, each once: ours first, the others by distribution and name."""
    found: dict[str, Provider] = {}
    for point in importlib.metadata.entry_points(group=hookspecs.ENTRY_POINT_GROUP):
        distribution = point.dist
        found.setdefault(
            point.value,
            Provider(
                plugin=point.name,
                module=point.value,
                distribution=distribution.name if distribution else None,
                version=distribution.version if distribution else None,
            ),
        )
    ours = [found.pop(module, None) or _in_source_tree(name, module) for name, module in BUILT_IN.items()]
    theirs = sorted(found.values(), key=lambda each: (each.distribution or "", each.plugin, each.module))
    return [each for each in ours if each is not None] + theirs


def _in_source_tree(plugin: str, module: str) -> Provider | None:
    """Only the package is looked for: whether the module imports is found out where failures are recorded."""
    return None if importlib.util.find_spec(module.partition(".")[0]) is None else Provider(plugin, module)


def _stage(manager: pluggy.PluginManager, provider: Provider) -> list[Entry]:
    """Import one plugin, check its hooks and collect what it registers."""
    module = importlib.import_module(provider.module)
    try:
        manager.register(module, name=provider.module)
    except pluggy.PluginValidationError as error:
        raise PluginError(f"a hook does not fit its specification: {str(error).splitlines()[-1]}") from error
    _check_hooks(manager, module)
    staged: dict[tuple[str, str], Entry] = {}

    def collect(name: str, target: type[Any] | Traversable) -> None:
        entry = make_entry(name, target, provider)
        if (entry.kind, name) in staged:
            raise PluginError(registered_twice(entry, provider))
        staged[entry.kind, name] = entry

    others = [each for each in manager.get_plugins() if each is not module]
    manager.subset_hook_caller("sma_register", remove_plugins=others)(register=collect)
    return list(staged.values())


def _check_hooks(manager: pluggy.PluginManager, module: ModuleType) -> None:
    known = [name for name in vars(hookspecs) if name.startswith("sma_")]
    callers = manager.get_hookcallers(module) or []
    for caller in callers:
        if not caller.has_spec():
            manager.unregister(module)
            raise PluginError(
                f"there is no hook {caller.name!r}{did_you_mean(caller.name, known)} (hooks: {', '.join(known)})"
            )
    if not callers:
        raise PluginError(f"it implements no hook: {module.__name__} needs '@sma.hookimpl def sma_register(register)'")
