"""What the pages say is true: ``python`` blocks run, ``sma`` commands are understood, every module has a page."""

from __future__ import annotations

import pkgutil
import re
import shlex
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

import sma
import sma_models
import sma_modules
from sma.plugins import isolated_registry
from sma_models.cli import app
from sma_models.cli.common import split_arguments
from sma_models.training.recipe import load_recipe

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
AUTOMODULE = re.compile(r"^\.\. automodule:: (\S+)$", re.MULTILINE)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))]
WITHOUT_PAGE = re.compile(
    r"sma\.plugin|sma_\w+\.plugin"  # the hooks of the built-in plugins
    r"|sma\.spec\.\w+|sma\.(ops|configurators|plugins)|sma_\w+\.(ops|reports|training)"  # parts of what has a page
    r"|sma_models\.training\.(data|sources)"
    r"|.*\.ops\.\w+\.\w+(\.\w+)?|sma_models\.commands(\.\w+)?"  # backends; commands, described as they are called
)
"""Modules that need no reference page."""


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    module = ModuleType("page")  # importable, so that annotations of the classes in it can be resolved
    monkeypatch.setitem(sys.modules, "page", module)
    with isolated_registry():  # what a page registers is gone after it
        for block in BLOCK.finditer(text):
            # Blank lines in front make the line numbers of a traceback those of the page.
            line = text.count("\n", 0, block.start(1))
            exec(compile("\n" * line + block[1], str(page), "exec"), module.__dict__)


def test_pages_with_code_are_found() -> None:
    assert ROOT / "README.md" in WITH_CODE


def commands() -> list[str]:
    """Every line of the pages that calls ``sma``."""
    blocks = [block[1] for page in PAGES for block in CONSOLE.finditer(page.read_text(encoding="utf-8"))]
    return sorted({line for block in blocks for line in block.splitlines() if line.startswith("sma ")})


@pytest.mark.parametrize("line", commands())
def test_commands_are_understood(line: str) -> None:
    group: Any = typer.main.get_command(app)
    _, name, *arguments = shlex.split(line, comments=True)
    context = group.commands[name].make_context(f"sma {name}", arguments)  # reads the arguments, runs nothing
    given = context.params
    recipe, overrides = split_arguments(given.get("arguments") or []) if name in ("train", "data") else (None, [])
    if name == "demo":
        recipe, overrides = "lm_stdlib", given["overrides"] or []
    names_a_plugin = "short_conv_lm" in line  # of the example package, which is not installed here
    if recipe is not None and not recipe.endswith(".yaml") and not names_a_plugin:
        load_recipe(recipe, *overrides)
    if name == "specs" and given["name"] and not names_a_plugin:
        source = ROOT / given["name"] if given["name"].endswith(".yaml") else given["name"]
        sma.load_spec(source, *given["overrides"] or [])


def test_commands_are_found() -> None:
    assert {shlex.split(line)[1] for line in commands()} >= {
        "train",
        "eval",
        "inspect",
        "generate",
        "serve",
        "specs",
        "convert",
    }


def test_every_module_has_one_reference_page() -> None:
    described = [name for page in PAGES for name in AUTOMODULE.findall(page.read_text(encoding="utf-8"))]
    assert sorted(set(described)) == sorted(described), "a module is described twice"
    there = [
        module.name
        for package in (sma, sma_modules, sma_models)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]
    missing = [name for name in there if name not in described and not WITHOUT_PAGE.fullmatch(name)]
    assert not missing, "a reference page with '.. automodule::' is missing"
    assert set(described) <= set(there)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s:]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{target} does not exist"


def test_generated_parts_name_everything_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    generated = import_module("generated")
    registry = sma.plugins.registry()
    for kind in ("configurator", "module", "mixer", "norm", "block", "model", "data", "spec"):
        part = generated.PARTS[kind if kind == "data" else f"{kind}s"]()
        assert [name for name in registry.names(kind) if f"`{name}`" not in part] == []
    group: Any = typer.main.get_command(app)
    assert [name for name in group.commands if f"## sma {name}\n" not in generated.commands()] == []
    marks = {mark for page in PAGES for mark in generated.MARK.findall(page.read_text(encoding="utf-8"))}
    assert marks == set(generated.PARTS), "a part is made that no page shows"
    assert generated.fill_in("<!-- generated: norms -->") == generated.PARTS["norms"]()
