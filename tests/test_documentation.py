"""What the pages say is true: ``python`` blocks run, ``sma`` commands are understood, every module has a page."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

import sma
from sma.plugins import isolated_registry
from sma_models.cli import app
from sma_models.cli.common import split_arguments
from sma_models.training.recipe import load_recipe

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DOCS = ROOT / "docs"
NOT_KEPT = ("_build/", "reference/parts/", "reference/operations/made/")
WRITTEN = [page for page in DOCS.rglob("*.md") if not page.relative_to(DOCS).as_posix().startswith(NOT_KEPT)]
PAGES = [ROOT / "README.md", *sorted(WRITTEN)]
PROSE = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module of ``docs/`` that makes pages."""
    monkeypatch.syspath_prepend(str(DOCS))
    return import_module


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


def test_every_module_has_one_reference_page(build: Callable[[str], ModuleType]) -> None:
    reference = build("reference_pages")
    written = [reference.fill_in(page.read_text(encoding="utf-8")) for page in PAGES]
    pages = [*written, *reference.made_pages().values()]
    described = [name for page in pages for name in re.findall(r"^\.\. automodule:: (\S+)$", page, re.MULTILINE)]
    assert sorted(set(described)) == sorted(described), "a module is described twice"
    classes = [name for page in pages for name in re.findall(r"^\.\. autoclass:: (\S+)$", page, re.MULTILINE)]
    alone = [f"{cls.__module__}.{cls.__name__}" for cls in reference.parts() if not reference.alone(cls)]
    assert sorted(classes) == sorted(alone)
    for name in ("sma.layer", "sma.routing", "sma.ops.compress", "sma.ops.backend"):
        assert name in described


def test_a_part_gets_its_page_from_the_registry(build: Callable[[str], ModuleType]) -> None:
    reference = build("reference_pages")
    pages = reference.made_pages()
    registry = sma.plugins.registry()
    for kind in reference.KINDS:
        for name in registry.names(kind):
            assert f"type: {name}" in pages[f"reference/parts/{kind}/{name}.md"]
            assert f"[`{name}`]" in reference.part_table(kind)
    gau = pages["reference/parts/module/gau.md"]
    assert "| `window` | `128` | activated tokens visible" in gau, "an option is described by its class"
    described = [page for path, page in pages.items() if path.split("/")[2] in ("module", "mixer", "norm")]
    assert [line for page in described for line in page.splitlines() if line.endswith("|  |")] == [], (
        "an option is missing under 'Attributes:' in the docstring of its Config"
    )


def test_a_module_belongs_to_the_longest_pattern(build: Callable[[str], ModuleType]) -> None:
    reference = build("reference_pages")
    assert reference.owners()["sma.routing"] == "sma.routing*"
    assert reference.owners()["sma.padding"] == "sma.*"
    assert reference.fill_in("<!-- modules: sma.errors* -->").startswith("## `sma.errors`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page: Path, build: Callable[[str], ModuleType]) -> None:
    made = {(DOCS / path).resolve() for path in build("reference_pages").made_pages()}
    for target in re.findall(r"\]\(([^)#\s:]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
        path = (page.parent / target).resolve()
        assert path.exists() or (path in made and page.parent != ROOT), f"{target} does not exist"


def test_lines_are_short() -> None:
    others = [page for name in ("benchmarks", "examples") for page in (ROOT / name).rglob("*.md")]
    long = {
        f"{page.relative_to(ROOT)}:{number}": len(line)
        for page in (*PROSE, *others)
        for number, line in enumerate(without_output(page).splitlines(), 1)
        if len(line) > 120
    }
    assert long == {}


def without_output(page: Path) -> str:
    """The page with the output of programs blanked, which cannot be broken."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"(?ms)^```text\n.*?^```$", lambda block: "\n" * block[0].count("\n"), text)


def sentences(page: Path) -> list[str]:
    """The sentences of running text: no code, tables, formulas or references."""
    text = re.sub(r"(?ms)^(```|\$\$).*?^\1$|^\|.*?$", "", page.read_text(encoding="utf-8"))
    text = re.sub(r"\{py:\w+\}`~?([^`]*)`|`[^`]*`|\$[^$]*\$", "name", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*[-*:] |\s*\d+\. )", text)
    return [each for paragraph in paragraphs for each in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split()))]


@pytest.mark.parametrize("page", PROSE, ids=lambda page: str(page.relative_to(ROOT)))
def test_sentences_are_short(page: Path) -> None:
    long = {each: count for each in sentences(page) if (count := len(re.findall(r"\S*\w\S*", each))) > 25}
    assert long == {}, "a sentence has more than 25 words"


def test_the_way_through_the_code_names_what_is_there(build: Callable[[str], ModuleType]) -> None:
    pytest.importorskip("matplotlib")
    pictures = build("draw_rooms")
    drawn = [path for _, _, where in pictures.WAY for path in re.findall(r"sma[\w/.]+", where)]
    told = re.findall(r"`(sma\w*/[\w/.]*)`", (DOCS / "explanation/find_your_way.md").read_text(encoding="utf-8"))
    assert len(told) >= 5
    assert [path for path in (*drawn, *told) if not (ROOT / path).exists()] == []
    rooms = {
        (title.split(":")[0], name.strip(","))
        for title, (_, rows) in pictures.ROOMS.items()
        for row in rows
        for names, _ in row
        for name in names.split()
        if "<" not in name and "*" not in name and name != "..."
    }
    missing = [f"{package}/{name}" for package, name in rooms if not list((ROOT / package).glob(f"{name.strip('/')}*"))]
    assert missing == []


def test_generated_parts_name_everything_there_is(build: Callable[[str], ModuleType]) -> None:
    generated = build("generated")
    assert [name for name in sma.plugins.registry().names("spec") if f"`{name}`" not in generated.specs()] == []
    group: Any = typer.main.get_command(app)
    assert [name for name in group.commands if f"## sma {name}\n" not in generated.commands()] == []
    marks = {mark for page in PAGES for mark in generated.MARK.findall(page.read_text(encoding="utf-8"))}
    assert marks == set(generated.PARTS), "a part is made that no page shows"
    assert generated.fill_in("<!-- generated: names -->") == generated.PARTS["names"]()
