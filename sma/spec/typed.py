"""Plain trees to typed configurations, guided by the annotations of their fields, and back."""

from __future__ import annotations

import dataclasses
import math
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any, Literal, Union

from sma.configurable import BaseConfig
from sma.errors import PluginError, SpecError
from sma.interfaces import KINDS, Plugin
from sma.plugins.registrations import SPEC, Registry, did_you_mean, either
from sma.spec.text import Written
from sma.spec.tree import Path, plain, show

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
    """The name of the type in messages."""
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
        return either([plugin.kind]) + ("" if KINDS[plugin.kind] is plugin else f" of class {plugin.__name__}")
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
    """Turns trees into values of a given type.

    Args:
        registry: where names are looked up.
        named: gives the tree of a registered spec, for a child that is described by one.
    """

    def __init__(self, registry: Registry, named: Callable[[str], Any]) -> None:
        self.registry = registry
        self.named = named
        self.within: list[str] = []

    def root(self, tree: Any, expect: Any) -> Any:
        """The configuration of a whole spec.

        Args:
            tree: references and extensions are in place.
            expect: an annotation, the name of a kind, or None for whatever kind ``type`` names, models first.
        """
        if isinstance(expect, str):
            if expect not in KINDS:
                known = ", ".join(sorted(KINDS))
                raise SpecError(f"no kind of plugin is named {expect!r}{did_you_mean(expect, KINDS)} (known: {known})")
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
            raise SpecError(f"spec: {name!r} may be {either(kinds)}: say which with kind=")
        if not kinds:
            raise SpecError(f"spec: {self.registry.explain_missing(sorted(KINDS), name)}")
        return KINDS[kinds[0]]

    def convert(self, annotation: Any, value: Any, path: Path, finite: bool) -> Any:
        """``value`` as the type that ``annotation`` asks for.

        Raises:
            SpecError: it is not; names the path, what was expected and what was found.
        """
        if isinstance(value, Written):
            value = value.text if _wants_text(annotation, value) else value.value
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        if origin is typing.Annotated:
            return self.convert(arguments[0], value, path, finite)
        if annotation is Any or annotation is object:
            return plain(value)
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
            return self._dataclass(typing.cast("type[Any]", annotation), value, path)
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
                if annotation is int and not -(2**63) <= value < 2**63:
                    raise SpecError(f"{show(path)}: expected an integer of 64 bits, got {value!r}")
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
            known = ", ".join(self.registry.names(*kinds)) or "none"
            return f"{show(path)}: missing key 'type', the name of {either(kinds)} (known: {known})"
        if not isinstance(name, str):
            return f"{show((*path, 'type'))}: expected the name of {either(kinds)}, got {shown(name)}"
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
        if len(value) > 1:
            raise SpecError(f"{show(path)}: {name!r} is a spec: to change parts of it write 'extends', not 'type'")
        if name in self.within:
            raise SpecError(f"{show(path)}: specs contain one another: {' -> '.join([*self.within, name])}")
        self.within.append(name)
        try:
            return self.convert(annotation, self.named(name), path, True)
        finally:
            self.within.pop()

    def _dataclass(self, cls: type[Any], value: Any, path: Path, name: str | None = None, base: Any = None) -> Any:
        """An instance of ``cls`` from a mapping; what the mapping leaves out comes from ``base`` if there is one."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, dict):
            raise SpecError(f"{show(path)}: expected a mapping, got {shown(value)}")
        place = f"{show(path)} ({name})" if name else show(path)
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
        for key in value:
            if key not in fields:
                hint = did_you_mean(key, fields) or f" (known: {', '.join(fields) or 'none'})"
                raise SpecError(f"{place}: unknown key {key!r}{hint}")
        standing = {key: _default(field) if base is None else getattr(base, key) for key, field in fields.items()}
        missing = [key for key in fields if _is_absent(value.get(key, standing[key]))]
        if missing:
            raise SpecError(f"{place}: missing key{'s' * (len(missing) > 1)} {', '.join(map(repr, missing))}")
        given = self._fields(cls, fields, standing, value, path)
        try:
            return cls(**given) if base is None else dataclasses.replace(base, **given)
        except SpecError:
            raise
        except (ValueError, TypeError) as error:  # a ConfigError, or what the __post_init__ of a plugin raises
            raise SpecError(f"{place}: {error}") from error

    def _fields(
        self, cls: type[Any], fields: Mapping[str, Any], standing: Mapping[str, Any], value: dict[str, Any], path: Path
    ) -> dict[str, Any]:
        """The values of the fields that are given; a mapping without ``type`` changes the value that is standing."""
        hints = hints_of(cls)
        given = {}
        for key, each in value.items():
            before = standing[key]
            if isinstance(each, dict) and "type" not in each and dataclasses.is_dataclass(before):
                plugin = plugin_of(type(before))
                name = self.registry.name_of(plugin) if plugin else None
                given[key] = self._dataclass(type(before), each, (*path, key), name, before)
            else:
                finite = not fields[key].metadata.get("allow_nonfinite", False)
                given[key] = self.convert(hints[key], each, (*path, key), finite)
        return given


def _wants_text(annotation: Any, written: Written) -> bool:
    """Whether an override means its text: in a field of strings, unless the field may be null and it says so."""
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    members = typing.get_args(annotation) or (annotation,)
    if written.text.strip() and written.value is None and types.NoneType in members:
        return False
    return {each for each in members if each is not types.NoneType} == {str}


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _is_absent(value: Any) -> bool:
    """No default, or OmegaConf's mark of a value that is still to be given."""
    return value is dataclasses.MISSING or (isinstance(value, str) and value == "???")
