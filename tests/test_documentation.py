"""Every ``python`` block of README.md and docs/ runs: the blocks of one page one after the other, in one namespace."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sma.plugins import isolated_registry

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_CODE = [page for page in PAGES if BLOCK.search(page.read_text(encoding="utf-8"))]


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
