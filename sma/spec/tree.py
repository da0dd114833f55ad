"""Plain trees (dicts, lists, values) before they get a type: merging, overriding, references.

A reference ``${a.b[0].c}`` stands for another value of the same spec; with leading dots it starts from where it stands,
as in OmegaConf. That is all: resolvers (``${oc.env:HOME}``) and nested references are refused, so that reading a spec
has no effect and no input but the spec.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from enum import Enum
from typing import Any, Final

from sma.errors import SpecError
from sma.spec.text import MAX_BYTES, MAX_DEPTH, MAX_VALUES, Written, parse_value

Path = tuple[str | int, ...]

_DOLLAR: Final = re.compile(r"(\\*)\$\{([^{}]*)(\}?)")
_REFERENCE: Final = re.compile(r"(\.*)((?:[A-Za-z0-9_-]+|\[\d+\])(?:\.[A-Za-z0-9_-]+|\[\d+\])*)")
_STEP: Final = re.compile(r"\[(\d+)\]|([^.\[\]]+)")


def show(path: Path) -> str:
    """``layers[0].norm`` of ``("layers", 0, "norm")``; ``spec`` for the root."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".") or "spec"


def split(text: str) -> Path:
    """The steps of ``layers[0].norm``; ``layers.0.norm`` means the same once it meets a list."""
    return tuple(int(index) if index else key for index, key in _STEP.findall(text))


class Budget:
    """How many values a spec may grow to while files, aliases and references are put in place."""

    def __init__(self, limit: int = MAX_VALUES) -> None:
        self.limit = limit
        self.left = limit

    def spend(self, values: int, path: Path) -> None:
        """Take ``values`` off.

        Raises:
            SpecError: nothing is left.
        """
        self.left -= values
        if self.left < 0:
            raise SpecError(f"{show(path)}: the spec grows to more than {self.limit} values")


def normalise(value: Any, budget: Budget, path: Path = ()) -> Any:
    """A copy in dicts and lists; scalars, enum members and dataclass instances are leaves.

    Raises:
        SpecError: a key is not a string, or the tree is too deep (as one that contains itself) or too large.
    """
    budget.spend(1, path)
    if len(path) > MAX_DEPTH:
        raise SpecError(f"{show(path[:4])}...: nested more than {MAX_DEPTH} levels deep")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise SpecError(f"{show(path)}: a key is a string, got {key!r} ({type(key).__name__})")
        return {key: normalise(item, budget, (*path, key)) for key, item in value.items()}
    if isinstance(value, list | tuple) and not isinstance(value, str):
        return [normalise(item, budget, (*path, index)) for index, item in enumerate(value)]
    return value


def plain(value: Any) -> Any:
    """The tree with every :class:`~sma.spec.text.Written` replaced by the value that it stands for."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value.value if isinstance(value, Written) else value


def is_leaf_object(value: Any) -> bool:
    """True for a value that is already in its typed form."""
    return isinstance(value, Enum) or (is_dataclass(value) and not isinstance(value, type))


def merge(base: Any, over: Any, *, keep: bool = False) -> Any:
    """``over`` laid upon ``base``: mappings key by key, anything else replaced.

    A mapping that names another ``type`` than the one below it starts afresh, since its keys are those of another
    class; ``keep`` lifts that (at the place of an ``extends``, where taking over the rest is the point). ``{eps: 1}``
    upon the shorthand ``layernorm`` keeps the type.
    """
    if isinstance(base, str) and isinstance(over, dict) and "type" not in over and "${" not in base:
        base = {"type": base}
    if not isinstance(base, dict) or not isinstance(over, dict):
        return over
    if not keep and "type" in over and over["type"] != base.get("type"):
        return over
    merged = dict(base)
    for key, value in over.items():
        merged[key] = merge(base[key], value) if key in base else value
    return merged


def override(tree: Any, assignment: str, open_up: Callable[[Any], Any]) -> Any:
    """Apply one ``key=value`` to the tree, in place where possible.

    Args:
        tree: a normalised tree.
        assignment: ``n_layers=6``, ``blocks[0].norm=rmsnorm``, ``blocks.0.norm.eps=1e-6``; the value as
            :func:`~sma.spec.text.parse_value` reads it.
        open_up: turns a shorthand (the name of a class or a spec) into the mapping that it stands for.

    Returns:
        The changed tree.

    Raises:
        SpecError: not of the form, or an index beyond its list.
    """
    written, equals, text = assignment.partition("=")
    key = written.strip()
    if not equals or not _REFERENCE.fullmatch(key) or key.startswith("."):
        raise SpecError(
            f"override {assignment!r}: must be of the form key=value, as in 'n_layers=6' or 'blocks[0].norm.eps=1e-6'"
        )
    if written != written.rstrip():  # "key = value": the blank belongs to the equals sign, not to the value
        text = text.lstrip()
    value = normalise(parse_value(text, f"override {assignment!r}"), Budget())
    steps = split(key)
    return _set(tree, steps, plain(value) if steps[-1] in ("type", "extends") else value, open_up, (), assignment)


def _set(node: Any, steps: Path, value: Any, open_up: Callable[[Any], Any], path: Path, assignment: str) -> Any:
    if not steps:
        return merge(node, value) if isinstance(value, dict) else value
    step, rest = steps[0], steps[1:]
    if isinstance(node, list):
        if isinstance(step, str) and step.isdigit():
            step = int(step)
        if not isinstance(step, int) or step >= len(node):
            raise SpecError(
                f"override {assignment!r}: {show(path)} is a list of {len(node)}, there is no {show((*path, step))}"
            )
        node[step] = _set(node[step], rest, value, open_up, (*path, step), assignment)
        return node
    if not isinstance(node, dict):
        node = open_up(plain(node))
    if isinstance(step, int):
        raise SpecError(f"override {assignment!r}: {show(path)} is no list")
    if step == "type" and not rest and path and node.get("type") not in (None, value):
        node = {}
    return {**node, step: _set(node.get(step), rest, value, open_up, (*path, step), assignment)}


def escape(text: str) -> str:
    """A string that :func:`resolve` turns into ``text`` again."""
    return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", text)


def rebase(tree: Any, path: Path) -> Any:
    """The tree with its absolute references rewritten for a root that holds it at ``path``."""
    if not path:
        return tree
    if isinstance(tree, dict):
        return {key: rebase(value, path) for key, value in tree.items()}
    if isinstance(tree, list):
        return [rebase(value, path) for value in tree]
    if not isinstance(tree, str):
        return tree

    def prefixed(match: re.Match[str]) -> str:
        if len(match[1]) % 2 or not match[3] or match[2].strip().startswith("."):
            return match[0]
        glue = "" if match[2].strip().startswith("[") else "."
        return f"{match[1]}${{{show(path)}{glue}{match[2].strip()}}}"

    return _DOLLAR.sub(prefixed, tree)


def resolve(tree: Any, budget: Budget) -> Any:
    """The tree with every reference replaced by the value it stands for.

    Raises:
        SpecError: a reference to nothing or to itself, a resolver, or a tree that grows beyond the budget.
    """
    return _Resolver(tree, budget).node(tree, ())


class _Resolver:
    def __init__(self, root: Any, budget: Budget) -> None:
        self.root = root
        self.budget = budget
        self.active: list[Path] = []
        self.depth = 0

    def node(self, node: Any, path: Path) -> Any:
        self.budget.spend(1, path)
        if isinstance(node, str) and "${" in node:
            return self.text(node, path)
        if not isinstance(node, dict | list):
            return node
        if self.depth > MAX_DEPTH:
            raise SpecError(f"{show(path)}: nested more than {MAX_DEPTH} levels deep, references followed")
        self.depth += 1
        try:
            if isinstance(node, dict):
                return {key: self.node(value, (*path, key)) for key, value in node.items()}
            return [self.node(value, (*path, index)) for index, value in enumerate(node)]
        finally:
            self.depth -= 1

    def text(self, text: str, path: Path) -> Any:
        if path in self.active:
            loop = [*self.active[self.active.index(path) :], path]
            raise SpecError(f"{show(path)}: references go in a circle: {' -> '.join(show(each) for each in loop)}")
        if len(self.active) >= MAX_DEPTH:
            raise SpecError(f"{show(path)}: more than {MAX_DEPTH} references lead to one another")
        self.active.append(path)
        try:
            return self._text(text, path)
        finally:
            self.active.pop()

    def _text(self, text: str, path: Path) -> Any:
        pieces: list[str] = []
        end = 0
        for match in _DOLLAR.finditer(text):
            pieces.append(text[end : match.start()] + "\\" * (len(match[1]) // 2))
            end = match.end()
            if len(match[1]) % 2:
                pieces.append(match[0][len(match[1]) :])
                continue
            if not match[3]:
                raise SpecError(f"{show(path)}: only plain references such as ${{a.b[0].c}} are allowed, got {text!r}")
            value = self.look_up(match[2].strip(), path)
            if match[0] == text:
                return value
            if isinstance(value, dict | list) or is_leaf_object(value):
                raise SpecError(
                    f"{show(path)}: ${{{match[2]}}} is {type(value).__name__} and cannot be part of a string"
                )
            pieces.append(str(value))
        result = "".join([*pieces, text[end:]])
        if len(result) > MAX_BYTES:
            raise SpecError(f"{show(path)}: a string grows to more than {MAX_BYTES} characters")
        self.budget.spend(len(result) // 64, path)
        return result

    def look_up(self, reference: str, path: Path) -> Any:
        match = _REFERENCE.fullmatch(reference)
        if match is None:
            rule = "resolvers are not allowed, a reference" if ":" in reference else "a reference"
            raise SpecError(
                f"{show(path)}: {rule} names another value of the spec (${{a.b[0].c}}), got '${{{reference}}}'"
            )
        dots = len(match[1])
        if dots > len(path):
            raise SpecError(f"{show(path)}: '${{{reference}}}' leads out of the spec")
        start: Path = path[: len(path) - dots] if dots else ()
        target: Path = ()
        node = self.root
        resolved = False  # True once a reference on the way was followed: what it gave is final
        for step in (*start, *split(match[2])):
            if not resolved and isinstance(node, str) and "${" in node:
                node = self.text(node, target)
                resolved = True
            if isinstance(node, list) and isinstance(step, str) and step.isdigit():
                step = int(step)
            found = (isinstance(node, dict) and step in node) or (
                isinstance(node, list) and isinstance(step, int) and step < len(node)
            )
            if not found:
                raise SpecError(
                    f"{show(path)}: '${{{reference}}}' refers to nothing: there is no {show((*target, step))}"
                )
            node = node[step]
            target = (*target, step)
        return node if resolved else self.node(node, target)
