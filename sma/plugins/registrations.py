"""Names of classes and specs, by kind, and who provides them."""

from __future__ import annotations

import dataclasses
import difflib
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from typing import Any, Final

from sma.errors import ConfigError, PluginError
from sma.interfaces import KINDS, kind_of

SPEC: Final = "spec"
RESERVED_KEYS: Final = frozenset({"type", "extends"})
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Provider:
    """Who registers.

    Attributes:
        plugin: short name, that of the entry point.
        module: Python module, or the file of a spec registered by hand.
        distribution: what was installed; None in a source tree and for a user's own code.
        version: of the distribution.
    """

    plugin: str
    module: str
    distribution: str | None = None
    version: str | None = None

    def __str__(self) -> str:
        if self.distribution is None:
            return self.module
        return f"{self.distribution} {self.version} ({self.module})"


@dataclass(frozen=True)
class Entry:
    """One registered name. ``target`` is a class, or the YAML file of a spec (kind ``spec``)."""

    name: str
    kind: str
    target: Any
    provider: Provider


@dataclass(frozen=True)
class Failure:
    """A plugin that was left out, and why. ``error`` is the exception with its traceback."""

    provider: Provider
    message: str
    error: BaseException

    def __str__(self) -> str:
        return f"{self.provider}: {self.message}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'window'?"`` when a known word is close to ``word``, else an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def either(kinds: Iterable[str]) -> str:
    """``"a mixer or a module"``."""
    return " or ".join(f"a {kind}" for kind in kinds)


def registered_twice(entry: Entry, by: Provider) -> str:
    """The message for an entry whose name ``by`` has taken already."""
    return f"the {entry.kind} {entry.name!r} is registered twice: by {by} and by {entry.provider}"


def make_entry(name: str, target: Any, provider: Provider) -> Entry:
    """Check a registration by itself.

    Raises:
        PluginError: the name is no name, or the target is neither a complete plugin class nor a file.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise PluginError(f"{name!r}: a name is a letter followed by letters, digits, '_' and '-'")
    if not isinstance(target, type) and isinstance(target, Traversable):
        return Entry(name, SPEC, target, provider)
    try:
        kind = kind_of(target)
    except ConfigError as error:
        raise PluginError(f"{name!r}: {error}; a spec is registered by the path of its file") from error
    _check_class(name, target, kind)
    return Entry(name, kind, target, provider)


def _check_class(name: str, cls: type[Any], kind: str) -> None:
    if KINDS[kind] is cls:
        raise PluginError(
            f"{name!r}: {cls.__qualname__} is the abstract base of its kind, register a class derived from it"
        )
    config = cls.Config
    if "__dataclass_fields__" not in config.__dict__:
        raise PluginError(f"{name!r}: {config.__qualname__} lacks @dataclass(kw_only=True, frozen=True)")
    taken = RESERVED_KEYS.intersection(field.name for field in dataclasses.fields(config))
    if taken:
        raise PluginError(f"{name!r}: {config.__qualname__}: the key {min(taken)!r} is reserved for specs")


class Registry:
    """What is registered, by kind and name. Every change is all or nothing."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], Entry] = {}
        self._names: dict[type[Any], str] = {}
        self._failures: list[Failure] = []
        self._lock = threading.RLock()

    def copy(self) -> Registry:
        """An independent registry with the same contents."""
        with self._lock:
            other = Registry()
            other._entries, other._names, other._failures = dict(self._entries), dict(self._names), list(self._failures)
            return other

    def register(self, name: str, target: type[Any] | Traversable) -> None:
        """Register from code outside any plugin; the same object under the same name again changes nothing.

        Raises:
            PluginError: the name is taken, or the target is no plugin.
        """
        module = getattr(target, "__module__", None) if isinstance(target, type) else str(target)
        self.commit([make_entry(name, target, Provider("user", str(module)))])

    def commit(self, entries: Iterable[Entry]) -> None:
        """Take over all of ``entries``, or none when one of their names is taken.

        Raises:
            PluginError: a name is taken by another class or file; names both providers.
        """
        with self._lock:
            staged: dict[tuple[str, str], Entry] = {}
            for entry in entries:
                key = (entry.kind, entry.name)
                known = self._entries.get(key) or staged.get(key)
                if known is None:
                    staged[key] = entry
                elif known.target != entry.target:
                    raise PluginError(registered_twice(entry, known.provider))
            self._entries.update(staged)
            for entry in staged.values():
                if entry.kind != SPEC:
                    self._names.setdefault(entry.target, entry.name)

    def fail(self, failure: Failure) -> None:
        """Record a plugin that was left out."""
        with self._lock:
            self._failures.append(failure)

    def get(self, kind: str, name: str) -> Any:
        """The class (or the file, for kind ``spec``) registered under ``name``.

        Raises:
            PluginError: there is none; the message lists the registered names, and the plugins that failed to load.
        """
        return self.entry(kind, name).target

    def entry(self, kind: str, name: str) -> Entry:
        """As :meth:`get`, with the provider."""
        found = self._entries.get((kind, name))
        if found is None:
            raise PluginError(self.explain_missing([kind], name))
        return found

    def has(self, kind: str, name: str) -> bool:
        """True when ``name`` is registered for ``kind``."""
        return (kind, name) in self._entries

    def names(self, *kinds: str) -> list[str]:
        """The names of one or several kinds, sorted."""
        return sorted({name for kind, name in list(self._entries) if kind in kinds})

    def kinds_of(self, name: str) -> list[str]:
        """The kinds (specs aside) that know ``name``, sorted."""
        return sorted(kind for kind, each in list(self._entries) if each == name and kind != SPEC)

    def name_of(self, cls: type[Any]) -> str | None:
        """The (first) name of a class; None when it is not registered."""
        return self._names.get(cls)

    def entries(self) -> list[Entry]:
        """Everything, sorted by kind and name."""
        return sorted(self._entries.values(), key=lambda entry: (entry.kind, entry.name))

    def failures(self) -> list[Failure]:
        """The plugins that were left out, in the order in which they were tried."""
        return list(self._failures)

    def explain_missing(self, kinds: list[str], name: str) -> str:
        """Why ``name`` cannot be found among ``kinds``: of another kind, misspelt, or lost with a failed plugin."""
        elsewhere = self.kinds_of(name)
        if elsewhere and SPEC not in kinds:
            return f"{name!r} is {either(elsewhere[:1])}, not {either(kinds)}"
        known = self.names(*kinds)
        what = f"no {' or '.join(kinds)} named" if len(kinds) < len(KINDS) else "nothing is registered as"
        message = f"{what} {name!r}{did_you_mean(name, known)}"
        message += f" (known: {', '.join(known) or 'none'})"
        if self._failures:
            message += "; plugins that failed to load: " + "; ".join(str(failure) for failure in self._failures)
        return message
