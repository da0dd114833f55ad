"""YAML text to plain values and back.

A spec may come from anywhere, so the text is read event by event and nothing in it can run or grow: no tags, no second
document, no duplicate keys, and bounds on the size, the depth and the number of values, every alias counted in full.
Numbers and truth values are those of YAML 1.2 (``1e-3`` is a number, ``on`` and ``no`` are strings).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import yaml

from sma.errors import SpecError

MAX_BYTES: Final = 256 * 1024
MAX_VALUES: Final = 20_000
MAX_DEPTH: Final = 64

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_YAML: Final = ("[", "{", "'", '"', "!")  # a tag is read in order to be refused
_SCALARS: Final = (
    ("null", re.compile(r"(~|null|Null|NULL|)"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(true|True|TRUE|false|False|FALSE)"), list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    (
        "float",
        re.compile(r"[-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF))|\.(nan|NaN|NAN)"),
        list("-+.0123456789"),
    ),
)


def parse(text: str, name: str, *, whole: bool = False) -> Any:
    """Plain values (dict, list, str, int, float, bool, None) of one YAML document; None when it is empty.

    Args:
        text: the document.
        name: what errors call it (a file name, ``override 'a=1'``).
        whole: whether the value must reach to the end of the text: no comment follows it.

    Raises:
        SpecError: the text is not YAML, or breaks one of the bounds; names ``name`` and the line.
    """
    if len(text) > MAX_BYTES:
        raise SpecError(f"{name}: a spec has at most {MAX_BYTES} bytes, got {len(text)}")
    try:
        reader = _Reader(text, name)
        value = reader.document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise SpecError(f"{name}{where}: not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise SpecError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from error
    if whole and (rest := text[reader.end :].strip()):
        raise SpecError(f"{name}: nothing may follow the closing bracket or quote, got {rest!r}; quote all of it")
    return value


class Written:
    """What an override says without quotes, where that may be no string: a number, a truth value or null.

    The field decides: one that holds strings takes the text (``data.root=2024`` names the folder 2024).

    Attributes:
        text: as it was written.
        value: what it stands for in YAML.
    """

    def __init__(self, text: str, value: Any) -> None:
        self.text = text
        self.value = value

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return repr(self.value)


def parse_value(text: str, name: str) -> Any:
    """The value of an override, which came through a shell.

    Text that begins with a bracket or a quote is YAML. Anything else is taken as it is: a ``#``, a colon or an
    asterisk in it has no meaning.

    Args:
        text: behind the equals sign.
        name: what errors call it.

    Returns:
        Plain values, or a :class:`Written` where the field decides whether a string is meant.

    Raises:
        SpecError: as for :func:`parse`; or something follows the closing bracket or quote.
    """
    if text.lstrip().startswith(_YAML):
        return parse(text, name, whole=True)
    if len(text) > MAX_BYTES:
        raise SpecError(f"{name}: a value has at most {MAX_BYTES} bytes, got {len(text)}")
    if yaml.reader.Reader.NON_PRINTABLE.search(text):
        raise SpecError(f"{name}: a value holds no control characters; write it in double quotes, with escapes")
    value = read_scalar(text.strip(), name)
    return text if isinstance(value, str) else Written(text, value)


def read_scalar(text: str, name: str) -> Any:
    """A scalar without quotes.

    Raises:
        SpecError: an integer is too long.
    """
    kind = next((kind for kind, pattern, _ in _SCALARS if pattern.fullmatch(text)), "str")
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "float":
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    if kind == "int":
        if len(text) > 40:
            raise SpecError(f"{name}: an integer of {len(text)} digits is too long")
        return int(text)
    return text


def render(tree: Any) -> str:
    """YAML text that :func:`parse` turns into ``tree`` again."""
    return str(yaml.dump(tree, Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=120))


class _Reader:
    """One pass over the events of a document."""

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self.events = self.read(text)
        self.anchors: dict[str, tuple[Any, int] | None] = {}
        self.count = 0
        self.end = 0

    def read(self, text: str) -> Iterator[Any]:
        """The events of the text; ``end`` follows the last one that is part of a value."""
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.NodeEvent | yaml.CollectionEndEvent) and event.end_mark is not None:
                self.end = event.end_mark.index
            yield event

    def document(self) -> Any:
        value: Any = None
        documents = 0
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self.error(event, "a spec is one document, found a second")
                value = self.value(next(self.events), 0)
        return value

    def error(self, event: Any, message: str) -> SpecError:
        return SpecError(f"{self.name}, line {event.start_mark.line + 1}: {message}")

    def spend(self, event: Any, values: int) -> None:
        self.count += values
        if self.count > MAX_VALUES:
            raise self.error(event, f"more than {MAX_VALUES} values, aliases written out")

    def value(self, event: Any, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise self.error(event, f"nested more than {MAX_DEPTH} levels deep")
        if isinstance(event, yaml.AliasEvent):
            return self.alias(event)
        if event.tag is not None:
            raise self.error(event, f"tags are not allowed, got {event.tag!r}")
        before = self.count
        self.spend(event, 1)
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        if isinstance(event, yaml.ScalarEvent):
            value = self.scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self.sequence(depth)
        else:
            value = self.mapping(depth)
        if event.anchor is not None:
            self.anchors[event.anchor] = (value, self.count - before)
        return value

    def alias(self, event: Any) -> Any:
        if event.anchor not in self.anchors:
            raise self.error(event, f"unknown alias '*{event.anchor}'")
        anchored = self.anchors[event.anchor]
        if anchored is None:
            raise self.error(event, f"the alias '*{event.anchor}' contains itself")
        value, size = anchored
        self.spend(event, size)
        return value

    def sequence(self, depth: int) -> list[Any]:
        items = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self.value(event, depth + 1))
        return items

    def mapping(self, depth: int) -> dict[str, Any]:
        items: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self.value(event, depth + 1)
            if not isinstance(key, str):
                raise self.error(event, f"a key is a string, got {key!r} ({type(key).__name__})")
            if key in items:
                raise self.error(event, f"duplicate key {key!r}")
            items[key] = self.value(next(self.events), depth + 1)
        return items

    def scalar(self, event: Any) -> Any:
        text: str = event.value
        if not event.implicit[0]:  # quoted or block style
            return text
        return read_scalar(text, f"{self.name}, line {event.start_mark.line + 1}")


class _Dumper(yaml.SafeDumper):
    """Writes strings in quotes exactly where :func:`parse` would read something else."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # the attribute of PyYAML that this replaces

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _SCALARS:
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern.pattern})\Z"), _first)
