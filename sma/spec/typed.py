"""Plain trees to typed configurations, guided by the annotations of their fields, and back."""

from __future__ import annotations

import dataclasses
import math
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, Literal, Union

from sma.configurable import BaseConfig
from sma.errors import PluginError, SpecError
from sma.interfaces import KINDS, Plugin
from sma.plugins.registry import SPEC, Registry, a, did_you_mean
from sma.spec.tree import Path, escape, show

_SCALARS: tuple[type[Any], ...] = (bool, int, float, str)
_LISTS: tuple[Any, ...] = (tuple, list, Sequence)
_DICTS: tuple[Any, ...] = (dict, Mapping)


def plugin_of(annotation: Any) -> type[Plugin] | None:
    """The plugin class whose ``Config`` the annotation is, or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseConfig):
        owner = getattr(annotation, "owner", None)
        if isinstance(owner, type) and issubclass(owner, Plugin):
            return owner
    return None


def shown(value: Any) -> str:
    """A value and its type, short enough for a message."""
    return "null" if value is None else f"{reprlib.repr(value)} ({type(value).__name__})"


def describe(annotation: Any) -> str:
    """What a person would call the type."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(each) for each in arguments)
    if origin is Literal:
        return "one of " + ", ".join(repr(each) for each in arguments)
    if annotation in _LISTS or origin in _LISTS:
        return (
            "a list of " + ", ".join(describe(each) for each in arguments if each is not ...) if arguments else "a list"
        )
    if annotation in _DICTS or origin in _DICTS:
        return f"a mapping to {describe(arguments[1])}" if arguments else "a mapping"
    if annotation is None or annotation is type(None):
        return "null"
    plugin = plugin_of(annotation)
    if plugin is not None:
        return a(plugin.kind) if KINDS[plugin.kind] is plugin else f"{a(plugin.kind)} of class {plugin.__name__}"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "one of " + ", ".join(repr(each.value) for each in annotation)
    return getattr(annotation, "__name__", str(annotation))


def hints_of(cls: type[Any]) -> dict[str, Any]:
    """The annotations of the fields that a dataclass is made from.

    Raises:
        PluginError: an annotation names something that its module does not know.
    """
    try:
        hints = typing.get_type_hints(cls)
    except NameError as error:
        raise PluginError(f"{cls.__module__}.{cls.__qualname__}: an annotation cannot be resolved: {error}") from error
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


class Converter:
    """Turns trees into values of a given type, with names looked up in ``registry``."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry

    def root(self, tree: Any, expect: Any) -> Any:
        """The configuration of a whole spec.

        Args:
            tree: references and extensions are in place.
            expect: an annotation, the name of a kind, or None for whatever kind ``type`` names, models first.
        """
        if isinstance(expect, str):
            if expect not in KINDS:
                raise SpecError(
                    f"no kind of plugin is named {expect!r}{did_you_mean(expect, KINDS)} (known: {', '.join(sorted(KINDS))})"
                )
            expect = KINDS[expect].Config
        if expect is None:
            expect = self._kind_of_root(tree).Config
        return self.convert(expect, tree, (), True)

    def _kind_of_root(self, tree: Mapping[str, Any]) -> type[Any]:
        name = tree.get("type")
        kinds = self.registry.kinds_of(name) if isinstance(name, str) else []
        if "model" in kinds or not isinstance(name, str):
            return KINDS["model"]
        if len(kinds) > 1:
            raise SpecError(f"spec: {name!r} may be {' or '.join(a(kind) for kind in kinds)}: say which with kind=")
        if not kinds:
            raise SpecError(f"spec: {self.registry.explain_missing(sorted(KINDS), name)}")
        return KINDS[kinds[0]]

    def convert(self, annotation: Any, value: Any, path: Path, finite: bool) -> Any:
        """``value`` as the type that ``annotation`` asks for.

        Raises:
            SpecError: it is not; names the path, what was expected and what was found.
        """
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        if origin is typing.Annotated:
            return self.convert(arguments[0], value, path, finite)
        if annotation is Any or annotation is object:
            return value
        if origin in (Union, types.UnionType):
            return self._union(arguments, annotation, value, path, finite)
        if origin is Literal:
            return self._choice(arguments, value, path)
        if annotation in _LISTS or origin in _LISTS:
            return self._list(annotation, origin, arguments, value, path, finite)
        if annotation in _DICTS or origin in _DICTS:
            if not isinstance(value, dict):
                raise SpecError(f"{show(path)}: expected {describe(annotation)}, got {shown(value)}")
            item = arguments[1] if arguments else Any
            return {key: self.convert(item, each, (*path, key), finite) for key, each in value.items()}
        if plugin_of(annotation) is not None:
            return self._plugin(annotation, value, path)
        if dataclasses.is_dataclass(annotation):
            return self._dataclass(annotation, value, path)
        return self._scalar(annotation, value, path, finite)

    def _scalar(self, annotation: Any, value: Any, path: Path, finite: bool) -> Any:
        if isinstance(annotation, type) and issubclass(annotation, Enum):
            return (
                value
                if isinstance(value, annotation)
                else annotation(self._choice([each.value for each in annotation], value, path))
            )
        if annotation is None or annotation is type(None):
            if value is None:
                return None
        elif annotation in _SCALARS and isinstance(value, annotation if annotation is not float else int | float):
            if isinstance(value, bool) == (annotation is bool):
                if finite and annotation is float and not math.isfinite(value):
                    raise SpecError(f"{show(path)}: expected a finite number, got {value!r}")
                return annotation(value)
        elif annotation not in _SCALARS and isinstance(annotation, type) and isinstance(value, annotation):
            return value
        raise SpecError(f"{show(path)}: expected {describe(annotation)}, got {shown(value)}")

    def _choice(self, choices: Iterable[Any], value: Any, path: Path) -> Any:
        choices = list(choices)
        for choice in choices:
            if type(choice) is type(value) and choice == value:
                return choice
        hint = (
            did_you_mean(value, [each for each in choices if isinstance(each, str)]) if isinstance(value, str) else ""
        )
        raise SpecError(
            f"{show(path)}: expected one of {', '.join(repr(each) for each in choices)}, got {shown(value)}{hint}"
        )

    def _list(
        self, annotation: Any, origin: Any, arguments: tuple[Any, ...], value: Any, path: Path, finite: bool
    ) -> Any:
        if not isinstance(value, list | tuple):
            raise SpecError(f"{show(path)}: expected {describe(annotation)}, got {shown(value)}")
        make = list if list in (annotation, origin) else tuple
        if make is tuple and tuple in (annotation, origin) and arguments and arguments[-1] is not ...:
            if len(value) != len(arguments):
                raise SpecError(
                    f"{show(path)}: expected {len(arguments)} items ({describe(annotation)}), got {len(value)}"
                )
            items: Sequence[Any] = arguments
        else:
            items = [arguments[0] if arguments else Any] * len(value)
        return make(
            self.convert(item, each, (*path, index), finite)
            for index, (item, each) in enumerate(zip(items, value, strict=True))
        )

    def _union(self, members: tuple[Any, ...], annotation: Any, value: Any, path: Path, finite: bool) -> Any:
        exact = [each for each in members if each is type(value)]
        fitting = exact or [each for each in members if self._fits(each, value)]
        if not fitting:
            plugins = [each for each in members if plugin_of(each) is not None]
            if plugins and isinstance(value, str | dict):
                raise SpecError(self._no_such_plugin(plugins, value, path))
            raise SpecError(f"{show(path)}: expected {describe(annotation)}, got {shown(value)}")
        failure: SpecError | None = None
        for each in fitting:
            try:
                return self.convert(each, value, path, finite)
            except SpecError as error:
                failure = failure or error
        assert failure is not None
        raise failure

    def _fits(self, annotation: Any, value: Any) -> bool:
        """Whether a member of a union is meant, told from the outermost level of the value."""
        origin = typing.get_origin(annotation)
        plugin = plugin_of(annotation)
        if plugin is not None:
            if isinstance(value, BaseConfig):
                return isinstance(value, annotation)
            name = value.get("type") if isinstance(value, dict) else value
            if name is None:
                return isinstance(value, dict) and KINDS[plugin.kind] is not plugin
            return isinstance(name, str) and (self.registry.has(plugin.kind, name) or self._is_spec(name))
        if annotation in _LISTS or origin in _LISTS:
            return isinstance(value, list | tuple)
        if annotation in _DICTS or origin in _DICTS:
            return isinstance(value, dict)
        if dataclasses.is_dataclass(annotation):
            return isinstance(value, dict | typing.cast(type, annotation))
        try:
            self.convert(annotation, value, (), False)
        except SpecError:
            return False
        return True

    def _is_spec(self, name: str) -> bool:
        return self.registry.has(SPEC, name) and not self.registry.kinds_of(name)

    def _no_such_plugin(self, annotations: Sequence[Any], value: Any, path: Path) -> str:
        plugins = [plugin for plugin in map(plugin_of, annotations) if plugin is not None]
        kinds = list(dict.fromkeys(plugin.kind for plugin in plugins))
        name = value.get("type") if isinstance(value, dict) else value
        if name is None:
            known = sorted({each for kind in kinds for each in self.registry.names(kind)})
            return f"{show(path)}: missing key 'type', the name of {' or '.join(a(kind) for kind in kinds)} (known: {', '.join(known) or 'none'})"
        if not isinstance(name, str):
            return f"{show((*path, 'type'))}: expected the name of {' or '.join(a(kind) for kind in kinds)}, got {shown(name)}"
        return f"{show(path)}: {self.registry.explain_missing(kinds, name)}"

    def _plugin(self, annotation: Any, value: Any, path: Path) -> Any:
        """The ``Config`` of the class that the value names; ``layernorm`` is short for ``{type: layernorm}``."""
        plugin = plugin_of(annotation)
        assert plugin is not None
        if isinstance(value, annotation):
            return value
        if isinstance(value, str):
            value = {"type": value}
        if not isinstance(value, dict):
            raise SpecError(f"{show(path)}: expected {describe(annotation)}, got {shown(value)}")
        name = value.get("type")
        if name is None and "type" not in value and KINDS[plugin.kind] is not plugin:
            return self._dataclass(annotation, value, path, self.registry.name_of(plugin))
        if not isinstance(name, str) or not self.registry.has(plugin.kind, name):
            if isinstance(name, str) and self._is_spec(name):
                return self._named_spec(annotation, name, value, path)
            raise SpecError(self._no_such_plugin([annotation], value, path))
        found = self.registry.get(plugin.kind, name)
        if not issubclass(found, plugin):
            raise SpecError(f"{show(path)}: expected {describe(annotation)}, got {name!r} of class {found.__name__}")
        return self._dataclass(found.Config, {key: each for key, each in value.items() if key != "type"}, path, name)

    def _named_spec(self, annotation: Any, name: str, value: dict[str, Any], path: Path) -> Any:
        """A child given by the name of a spec instead of a class."""
        from sma.spec import load  # a spec within a spec is loaded as any other

        if len(value) > 1:
            raise SpecError(
                f"{show(path)}: {name!r} is a spec; to change parts of it write 'extends: {name}' instead of 'type'"
            )
        try:
            config = load(name)
        except SpecError as error:
            raise SpecError(f"{show(path)}: spec {name!r}: {error}") from error
        if not isinstance(config, annotation):
            raise SpecError(
                f"{show(path)}: the spec {name!r} describes {a(config.owner.kind)}, expected {describe(annotation)}"
            )
        return config

    def _dataclass(self, cls: type[Any], value: Any, path: Path, name: str | None = None) -> Any:
        if isinstance(value, cls):
            return value
        if not isinstance(value, dict):
            raise SpecError(f"{show(path)}: expected a mapping, got {shown(value)}")
        place = f"{show(path)} ({name})" if name else show(path)
        hints = hints_of(cls)
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
        for key in value:
            if key not in fields:
                hint = did_you_mean(key, fields) or f" (known: {', '.join(fields) or 'none'})"
                raise SpecError(f"{place}: unknown key {key!r}{hint}")
        missing = [
            each.name
            for each in fields.values()
            if each.default is dataclasses.MISSING
            and each.default_factory is dataclasses.MISSING
            and value.get(each.name, "???") == "???"
        ]
        if missing:
            raise SpecError(
                f"{place}: missing {'key' if len(missing) == 1 else 'keys'} {', '.join(map(repr, missing))}"
            )
        given = {
            key: self.convert(hints[key], each, (*path, key), not fields[key].metadata.get("allow_nonfinite", False))
            for key, each in value.items()
        }
        try:
            return cls(**given)
        except SpecError:
            raise
        except (
            ValueError,
            TypeError,
        ) as error:  # a ConfigError, or what a stranger's __post_init__ raises for a bad value
            raise SpecError(f"{place}: {error}") from error


def unload(value: Any, registry: Registry, declared: Any = None) -> Any:
    """The plain tree that :class:`Converter` turns into ``value`` again.

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
            name = registry.name_of(plugin)
            if name is not None:
                tree["type"] = name
            elif not _mentions(declared, type(value)):
                raise SpecError(
                    f"{plugin.__module__}.{plugin.__qualname__} is not registered, so no spec can name it; see sma.register"
                )
        hints = hints_of(type(value))
        return tree | {key: unload(getattr(value, key), registry, hint) for key, hint in hints.items()}
    if isinstance(value, Mapping):
        return {key: unload(each, registry, declared) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [unload(each, registry, declared) for each in value]
    return escape(value) if isinstance(value, str) else value


def _mentions(annotation: Any, cls: type[Any]) -> bool:
    return annotation is cls or any(_mentions(each, cls) for each in typing.get_args(annotation))
