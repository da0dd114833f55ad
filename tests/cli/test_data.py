"""``sma data`` on ordinary folders, and values that cross the shell, YAML and patterns."""

from __future__ import annotations

from pathlib import Path

import pytest

from sma_models.cli import main

SOURCE = "\n".join(f"value_{i} = {i * i}" for i in range(400))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a package, a version control folder and awkward names."""
    for name in ("pkg/sub", "pkg/.git", "run #3", "2024"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("pkg/a[1].py", "pkg/b.py", "pkg/.git/config", "run #3/c.txt", "2024/d.txt"):
        (tmp_path / name).write_text(SOURCE)
    (tmp_path / "pkg/sub/__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("override", "files", "note"),
    [
        ("data.root=pkg", 2, "skipped 1 hidden file or folder and 1 empty file"),
        ("data.root=run #3", 1, ""),
        ("data.root=2024", 1, ""),
        ("data.root=pkg/a[1].py", 1, ""),
        ("data.files=['pkg/a[1].py', pkg/b.py, ./pkg/b.py]", 2, ""),
    ],
)
def test_names_are_taken_literally(
    folder: Path, override: str, files: int, note: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "lm", override, "data.fractions=[0.1, 0.1]"]) == 0
    said = capsys.readouterr().out
    assert ("skipped" in said) == bool(note)
    assert note in said
    assert f"{int(0.1 * files * len(SOURCE)):,}" in said


@pytest.mark.parametrize("override", ["data.root=", "data.files=['']"])
def test_an_empty_value_is_no_folder(folder: Path, override: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "lm", override]) == 2
    assert "must" in capsys.readouterr().err
