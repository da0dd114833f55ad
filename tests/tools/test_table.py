"""The table of the documentation says what was tried."""

from __future__ import annotations

import ast
from pathlib import Path

from docs.generated import fill_in
from tests.tools.parts import KINDS as LAWS
from tests.tools.parts import PARTS
from tests.tools.table import KINDS, ROWS, markdown
from tests.tools.tools import linears

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "reference" / "modules" / "tools_and_parts.md"


def test_every_kind_of_part_has_a_column() -> None:
    assert set(KINDS) == set(LAWS)


def test_every_tool_is_tried_and_every_trial_is_in_the_table() -> None:
    tried = {
        f"{path.stem}.{node.name}"
        for path in FOLDER.glob("test_*.py")
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    listed = {test for row in ROWS for test in row.tests}
    assert listed <= tried
    assert {test for test in tried - listed if not test.startswith(("test_table.", "test_plain."))} == set()


def test_kinds_without_a_projection() -> None:
    without = {kind for kind in KINDS if not any(linears(part.build()) for part in PARTS if part.kind == kind)}
    assert without == {"norm"}
    for row in ROWS:
        assert set(row.nothing) <= without


def test_the_page_shows_the_table() -> None:
    assert markdown() in fill_in(PAGE.read_text("utf-8"))
