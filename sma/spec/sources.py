"""Where a spec comes from: a registered name, a file, a mapping, an OmegaConf node; and what it extends."""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources.abc import Traversable
from typing import Any

from sma.errors import SpecError
from sma.plugins.registrations import SPEC, Registry
from sma.spec.dumping import unload
from sma.spec.text import MAX_BYTES, MAX_DEPTH, parse
from sma.spec.tree import Budget, Path, is_leaf_object, merge, normalise, rebase, resolve, show

SUFFIXES = (".yaml", ".yml")
_COST_OF_OPENING = 20


@dataclass(frozen=True)
class Document:
    """A spec as read.

    Attributes:
        tree: normalised.
        label: what errors call it.
        folder: where the files that it extends are looked for; None for the working directory.
        may_open: whether it may extend files at all. Text may not: it may come with a checkpoint from an untrusted
            source.
    """

    tree: Any
    label: str
    folder: Traversable | None = None
    may_open: bool = True


class Reader:
    """Reads sources and puts every ``extends`` in place; one per spec, since the budget is for the whole of it."""

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.budget = Budget()

    def read(self, source: Any) -> Document:
        """The tree of ``source`` with every ``extends`` put in place; references are still references.

        Raises:
            SpecError: there is no such source, it is no mapping, or what it extends cannot be had.
        """
        return self._expanded(self._open(source))

    def read_text(self, text: str, label: str) -> Document:
        """As :meth:`read`, from YAML text, which may not extend files.

        Raises:
            SpecError: as for :meth:`read`.
        """
        return self._expanded(Document(self._parse(text, label), label, may_open=False))

    def _expanded(self, document: Document) -> Document:
        return replace(document, tree=self.expand(document.tree, document, (document.label,)))

    def expand(
        self, node: Any, document: Document, chain: tuple[str, ...] = (), path: Path = (), depth: int = 0
    ) -> Any:
        """``node`` of ``document`` with every ``extends`` in it replaced by what it names.

        Args:
            node: a normalised tree.
            document: whose folder is the one that file names are relative to.
            chain: what is being extended, outermost first.
            path: of ``node`` in its own document.
            depth: of that document in the whole spec.
        """
        if depth + len(path) > MAX_DEPTH:
            raise SpecError(f"{show(path)}: nested more than {MAX_DEPTH} levels deep, extended specs put in place")
        if isinstance(node, list):
            return [self.expand(item, document, chain, (*path, index), depth) for index, item in enumerate(node)]
        if not isinstance(node, dict):
            return node
        own = {
            key: self.expand(item, document, chain, (*path, key), depth)
            for key, item in node.items()
            if key != "extends"
        }
        if "extends" not in node:
            return own
        base = self._extended(node["extends"], document, chain, path, depth + len(path))
        return merge(rebase(base, path), own, keep=True)

    def named(self, name: str) -> Any:
        """The tree of a registered spec, references resolved."""
        self.budget.spend(_COST_OF_OPENING, ())
        return resolve(self.read(name).tree, self.budget)

    def _extended(self, name: Any, document: Document, chain: tuple[str, ...], path: Path, depth: int) -> Any:
        if not isinstance(name, str):
            raise SpecError(f"{show(path)}: 'extends' names one spec or file, got {name!r} ({type(name).__name__})")
        if not document.may_open and name.lower().endswith(SUFFIXES):
            raise SpecError(f"{show(path)}: extends {name!r}: a spec given as text may extend registered specs only")
        try:
            base = self._open_named(name, document.folder)
        except SpecError as error:
            raise SpecError(f"{show(path)}: extends {name!r}: {error}") from error
        if base.label in chain:
            raise SpecError(f"{show(path)}: specs extend one another in a circle: {' -> '.join([*chain, base.label])}")
        self.budget.spend(_COST_OF_OPENING, path)
        return self.expand(base.tree, base, (*chain, base.label), (), depth)

    def open_up(self, node: Any) -> dict[str, Any]:
        """The mapping that a shorthand stands for, so that an override can reach into it."""
        if node is None:
            return {}
        if is_leaf_object(node) and not isinstance(node, str):
            opened = unload(node, self.registry)
            if isinstance(opened, dict):
                return opened
        if isinstance(node, str) and self.registry.has(SPEC, node) and not self.registry.kinds_of(node):
            opened = self.read(node).tree
            if isinstance(opened, dict):
                return opened
        return {"type": node}

    def _open(self, source: Any) -> Document:
        if isinstance(source, str | os.PathLike):
            return self._open_named(source if isinstance(source, str) else pathlib.Path(source), None)
        if _is_omegaconf(source):
            source = _plain(source)
        if not isinstance(source, Mapping):
            raise SpecError(
                "a spec is a registered name, a path of a .yaml file, a mapping, an OmegaConf node or a configuration, "
                f"got {source!r:.60} ({type(source).__name__})"
            )
        return Document(normalise(source, self.budget), "mapping")

    def _open_named(self, name: str | pathlib.Path, folder: Traversable | None) -> Document:
        if isinstance(name, pathlib.Path) or name.lower().endswith(SUFFIXES):
            file = pathlib.Path(os.path.expanduser(name))
            if folder is not None and not file.is_absolute():
                return self._open_file(folder.joinpath(str(name)))
            return self._open_file(file)
        if self.registry.has(SPEC, name):
            file = self.registry.get(SPEC, name)
            return self._open_file(file)
        if self.registry.kinds_of(name):
            return Document({"type": name}, name)
        hint = f"; a file ends in {' or '.join(SUFFIXES)}" if os.sep in name or "." in name else ""
        raise SpecError(self.registry.explain_missing([SPEC], name) + hint)

    def _open_file(self, file: Traversable) -> Document:
        try:
            with file.open("rb") as stream:
                data = stream.read(MAX_BYTES + 1)
        except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
            raise SpecError(f"{file}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
        if len(data) > MAX_BYTES:
            raise SpecError(f"{file}: a spec has at most {MAX_BYTES} bytes")
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise SpecError(f"{file}: a spec is UTF-8 text, byte {error.start} is not") from error
        return Document(self._parse(text, str(file)), str(file), getattr(file, "parent", None))

    def _parse(self, text: str, label: str) -> Any:
        tree = parse(text, label)
        if not isinstance(tree, dict):
            found = "nothing" if tree is None else f"{tree!r:.60} ({type(tree).__name__})"
            raise SpecError(f"{label}: a spec is a mapping, got {found}")
        return normalise(tree, self.budget)


def _is_omegaconf(source: Any) -> bool:
    """Checked without importing OmegaConf: unless it was imported, no value can be one of its nodes."""
    module = sys.modules.get("omegaconf")
    return module is not None and isinstance(source, module.Container)


def _plain(source: Any) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return OmegaConf.to_container(source, resolve=False, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise SpecError(f"the OmegaConf node cannot be read: {' '.join(str(error).split())}") from error
