"""How the modules of the packages import each other: in no circle, and under names that hide nothing."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import grimp
import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("sma", "sma_modules", "sma_models")
FOLDERS = sorted(path.parent for package in PACKAGES for path in (ROOT / package).rglob("__init__.py"))


def circles(graph: grimp.ImportGraph) -> list[list[str]]:
    """The strongly connected components of more than one module."""
    upstream = {module: graph.find_upstream_modules(module) for module in graph.modules}
    found = {frozenset({one, *(other for other in upstream[one] if one in upstream[other])}) for one in upstream}
    return sorted(sorted(component) for component in found if len(component) > 1)


def test_no_import_circle() -> None:
    """At run time, inside functions or for types; a package's ``__init__`` counts as a module like any other."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None, exclude_type_checking_imports=False)
    assert circles(graph) == []


def test_a_circle_is_found() -> None:
    graph = grimp.ImportGraph()
    for importer, imported in (("a", "a.b"), ("a.b", "a.c"), ("a.c", "a"), ("d", "a"), ("a.b", "e")):
        graph.add_import(importer=importer, imported=imported)
    assert circles(graph) == [["a", "a.b", "a.c"]]


def bound(source: str) -> Iterator[tuple[str, str | None]]:
    """Names that an ``__init__`` binds, each with the module that it stands for if it is imported."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom):
            for each in node.names:
                yield each.asname or each.name, f"{node.module}.{each.name}"
        elif isinstance(node, ast.Import):
            yield from ((each.asname or each.name.split(".")[0], each.name) for each in node.names)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, None
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (
                (each.id, None) for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)
            )


def hidden(source: str, package: str, modules: set[str]) -> list[str]:
    """Modules of a package whose names its ``__init__`` gives to something else."""
    return sorted(name for name, origin in bound(source) if name in modules and origin != f"{package}.{name}")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.relative_to(ROOT).as_posix())
def test_no_name_hides_a_module(folder: Path) -> None:
    """``import package.module`` gives the module, whatever was imported before."""
    package = ".".join(folder.relative_to(ROOT).parts)
    modules = {each.name for each in pkgutil.iter_modules([str(folder)])}
    assert hidden((folder / "__init__.py").read_text(encoding="utf-8"), package, modules) == []
    imported = importlib.import_module(package)
    for name in modules & vars(imported).keys():
        value = vars(imported)[name]
        assert isinstance(value, ModuleType), f"{package}.{name} is {value!r}"
        assert value.__name__ == f"{package}.{name}"


def test_a_hidden_module_is_found() -> None:
    modules = {"a", "b", "c", "d", "e"}
    assert hidden("from p.a import a\nfrom p import b\ndef c(): ...\nd: int = 1", "p", modules) == ["a", "c", "d"]


def test_an_operation_is_a_package() -> None:
    import sma.ops.compress as package

    assert isinstance(package, ModuleType)
    assert callable(package.compress)
