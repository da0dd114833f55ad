"""Reference pages that are made from the code: a page for each registered part, a page for each operation, and the
modules that the pages written by hand ask for by pattern.

A page written by hand holds ``<!-- modules: PATTERN ... -->`` alone on a line. Every module of the library belongs to
the longest pattern that matches its name, so a module that moves or is new needs no edit here. The pages in
``MADE`` are written when Sphinx starts and are not kept in the repository; ``<!-- parts: KIND -->`` and
``<!-- operations -->`` are the tables that lead to them.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections import Counter
from dataclasses import fields
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from generated import default_of, summary_of, table

import sma
import sma_models
import sma_modules
from sma.plugins import Registry

DOCS = Path(__file__).parent
KINDS = ("configurator", "module", "mixer", "norm", "block", "model", "data")
MADE = ("reference/parts", "reference/operations/made")
PART_TABLE = re.compile(r"^<!-- parts: (\w+) -->$", re.MULTILINE)
OPERATION_TABLE = "<!-- operations -->"
PATTERNS = re.compile(r"^<!-- modules: (.+) -->$", re.MULTILINE)
WITHOUT_PAGE = re.compile(
    r"sma_models\.__main__|sma_models\.cli\.\w+"  # commands are described as they are called
    r"|sma\.spec\.\w+"  # its names are those of the package
    r"|.*\.ops\.\w+\.\w+(\.\w+)*"  # backends
)
OPERATION = re.compile(r"sma(_modules)?\.ops\.\w+")


@cache
def modules() -> tuple[str, ...]:
    """Every module of the three packages."""
    return tuple(
        module.name
        for package in (sma, sma_modules, sma_models)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    )


@cache
def parts() -> dict[type[Any], tuple[str, str]]:
    """Every registered class of the library with its kind and name."""
    registry = sma.plugins.registry()
    found = {registry.get(kind, name): (kind, name) for kind in KINDS for name in registry.names(kind)}
    return {cls: key for cls, key in found.items() if cls.__module__ in modules()}


def alone(cls: type[Any]) -> bool:
    """Whether ``cls`` is the only part of its module, so that its page describes the whole module."""
    return Counter(each.__module__ for each in parts())[cls.__module__] == 1


@cache
def operations() -> tuple[str, ...]:
    """The packages of the operations."""
    return tuple(name for name in modules() if OPERATION.fullmatch(name) and _is_package(name))


@cache
def owners() -> dict[str, str]:
    """Each module that a page written by hand describes, with the pattern that it belongs to."""
    patterns = [each for page in DOCS.rglob("*.md") for mark in PATTERNS.findall(_text(page)) for each in mark.split()]
    on_part_pages = {cls.__module__ for cls in parts() if alone(cls)}
    found = {}
    for name in modules():
        if WITHOUT_PAGE.fullmatch(name) or name in on_part_pages or name in operations():
            continue
        matching = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
        if not matching:
            raise LookupError(f"no '<!-- modules: ... -->' in docs/ takes {name}")
        found[name] = max(matching, key=len)
    return found


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _is_package(name: str) -> bool:
    return hasattr(importlib.import_module(name), "__path__")


def fill_in(text: str) -> str:
    """``text`` with every mark replaced: by sections for the modules that belong to it, or by a table of made pages."""

    def sections(mark: re.Match[str]) -> str:
        taken = [name for pattern in mark[1].split() for name, owner in owners().items() if owner == pattern]
        return "\n\n".join(f"## `{name}`\n\n{automodule(name)}" for name in taken)

    text = PART_TABLE.sub(lambda mark: part_table(mark[1]), PATTERNS.sub(sections, text))
    return text.replace(OPERATION_TABLE, operation_table()) if OPERATION_TABLE in text else text


def automodule(name: str) -> str:
    """Everything that the module defines, but for the parts that have pages of their own."""
    elsewhere = [cls.__name__ for cls in parts() if cls.__module__ == name and not alone(cls)]
    options = ["   :ignore-module-all:"]  # a name is described where it is defined
    options += [f"   :exclude-members: {', '.join(sorted(elsewhere))}"] if elsewhere else []
    return _directive(f".. automodule:: {name}", *options)


def _directive(*lines: str) -> str:
    return "\n".join(["```{eval-rst}", *lines, "```"])


def made_pages() -> dict[str, str]:
    """The pages that are made: paths below ``docs/`` and their Markdown."""
    pages = {f"{MADE[0]}/{kind}/{name}.md": _part_page(cls, kind, name) for cls, (kind, name) in parts().items()}
    for operation in operations():
        pages[f"{MADE[1]}/{operation.split('.')[-1]}.md"] = _operation_page(operation)
    return pages


def write_made_pages() -> None:
    """Write what has changed, and delete the pages of parts that are gone."""
    pages = made_pages()
    for folder in MADE:
        for old in (DOCS / folder).rglob("*.md"):
            if old.relative_to(DOCS).as_posix() not in pages:
                old.unlink()
    for path, text in pages.items():
        page = DOCS / path
        page.parent.mkdir(parents=True, exist_ok=True)
        if not page.exists() or _text(page) != text:
            page.write_text(text, encoding="utf-8")


def _part_page(cls: type[Any], kind: str, name: str) -> str:
    registry: Registry = sma.plugins.registry()
    provider = registry.entry(kind, name).provider
    head = f"# {name}\n\nIn a spec: `type: {name}`. Kind: `{kind}`. Registered by `{provider.module}`."
    shared = _directive(f".. autoclass:: {cls.__module__}.{cls.__name__}")
    body = automodule(cls.__module__) if alone(cls) else shared
    return f"{head}\n\n## Options\n\n{_options(cls.Config)}\n\n## Class\n\n{body}\n"


def _options(config: type[Any]) -> str:
    meanings = _meanings(config)
    rows = [[f"`{each.name}`", default_of(each), meanings.get(each.name, "")] for each in fields(config)]
    return table(["option", "default", "meaning"], rows) if rows else "None."


def _meanings(config: type[Any]) -> dict[str, str]:
    """What the ``Attributes:`` of a configuration and of its bases say about each field."""
    found: dict[str, list[str]] = {}
    for cls in reversed(config.__mro__):
        _, _, section = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")
        name = ""
        for line in section.splitlines():
            if line.startswith(" " * 8):
                found[name].append(line.strip())
            elif new := re.match(r" {4}(\w+): (.*)", line):
                name = new[1]
                found[name] = [new[2]]
            elif line.strip():
                break
    return {name: _plain(" ".join(lines)) for name, lines in found.items()}


def _plain(text: str) -> str:
    return re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text).replace("``", "`")


def _operation_page(name: str) -> str:
    short = name.split(".")[-1]
    module = importlib.import_module(name)
    page = f"# {short}\n\n{_directive(f'.. automodule:: {name}')}\n"
    derivation = Path(str(module.__file__)).with_name("README.md")
    if derivation.exists():
        text = re.sub(r"\A# .*\n", "", derivation.read_text(encoding="utf-8"))
        text = re.sub(r"\]\(\.\./(\w+)/(?:README\.md|op\.py)\)", r"](\1.md)", text)
        page += f"\n## Derivation\n\n{re.sub('^#', '##', text, flags=re.MULTILINE).strip()}\n"
    return page


def part_table(kind: str) -> str:
    """A table of the parts of a kind and, hidden, the tree of their pages."""
    mine = {name: cls for cls, (its_kind, name) in parts().items() if its_kind == kind}
    rows = [[f"[`{name}`](/{MADE[0]}/{kind}/{name}.md)", summary_of(mine[name])] for name in sorted(mine)]
    pages = "\n".join(f"/{MADE[0]}/{kind}/{name}" for name in sorted(mine))
    return f"{table(['`type`', ''], rows)}\n\n```{{toctree}}\n:hidden:\n\n{pages}\n```"


def operation_table() -> str:
    """A table of the operations and, hidden, the tree of their pages."""
    names = {each.split(".")[-1]: each for each in operations()}
    rows = [
        [f"[`{short}`](/{MADE[1]}/{short}.md)", f"`{names[short].split('.')[0]}`", _first_line(names[short])]
        for short in sorted(names)
    ]
    pages = "\n".join(f"/{MADE[1]}/{short}" for short in sorted(names))
    return f"{table(['operation', 'package', ''], rows)}\n\n```{{toctree}}\n:hidden:\n\n{pages}\n```"


def _first_line(name: str) -> str:
    line = (importlib.import_module(name).__doc__ or "").split("\n\n")[0].replace("\n", " ")
    return _plain(re.sub(r"^\w+: ", "", line))
