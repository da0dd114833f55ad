"""Any files: how they are found and split, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sma.errors import ConfigError, DataError
from sma_models.training.data import enwik8, files, stdlib
from sma_models.training.data.testing import Broken, DataSuite


class TestFiles(DataSuite):
    config = files.FilesData.Config(seq_len=16, fractions=(0.1, 0.1))
    refused = (("seq_len", 0), ("eval_seq_len", 0), ("fractions", (0.0, 0.1)))

    def write(self, root: Path) -> None:
        for name in "abc":
            (root / f"{name}.txt").write_text("".join(f"{name}: line {n}\n" for n in range(40)))


class TestOneFile(TestFiles):
    broken = (Broken("only.txt", b"", "must hold data, got an empty file"),)

    def write(self, root: Path) -> None:
        (root / "only.txt").write_text("".join(f"line {n}\n" for n in range(80)))


class TestWholeFiles(TestFiles):
    config = files.FilesData.Config(seq_len=16, split="files", fractions=(0.3, 0.3), carry_state=True)

    def write(self, root: Path) -> None:
        for number in range(30):
            (root / f"{number}.txt").write_text(f"this is file {number}\n" * 4)


def test_files_are_split_at_bytes_or_between_files(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"{number:02}.txt").write_bytes(bytes([number]) * 10)
    splits = files.load([tmp_path / "*.txt"], fractions=(0.1, 0.2))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (420, 60, 120)
    joined = b"".join(part.data.tobytes() for part in (splits.train, splits.validation, splits.test))
    assert joined == b"".join(bytes([number]) * 10 for number in range(60))

    by_file = files.load([tmp_path], split="files", fractions=(0.2, 0.2))
    names = [{name for name, _ in part.documents} for part in (by_file.train, by_file.validation, by_file.test)]
    assert sum(map(len, names)) == len(set.union(*names)) == 60
    assert min(map(len, names)) >= 4
    (tmp_path / "00a.txt").write_bytes(b"new")
    later = files.load([tmp_path], split="files", fractions=(0.2, 0.2))
    assert names[2] <= {name for name, _ in later.test.documents}


@pytest.mark.parametrize(
    ("fractions", "split", "message"),
    [((0.0, 0.1), "bytes", "fractions"), ((0.5, 0.5), "files", "fractions"), ((0.1, 0.1), "lines", "split: must be")],
)
def test_bad_splits_are_refused(tmp_path: Path, fractions: tuple[float, float], split: str, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc" * 100)
    with pytest.raises(ConfigError, match=message):
        files.load([tmp_path], split=split, fractions=fractions)  # type: ignore[arg-type]


def test_files_without_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\*\.txt: must name at least one file, got none"):
        files.load([tmp_path / "*.txt"])
    with pytest.raises(DataError, match="at least one file, got an empty list"):
        files.load([])
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.txt: must hold data, got an empty file"):
        files.load([tmp_path])
    with pytest.raises(DataError, match=r"a\.txt: must hold data, got an empty file"):
        files.load([tmp_path], split="files")
    (tmp_path / "a.txt").write_bytes(b"abc")
    with pytest.raises(DataError, match="validation split: must hold data"):
        files.load([tmp_path])


def test_hidden_and_empty_files_are_passed_over_and_counted(tmp_path: Path) -> None:
    for name in (".git/objects", "sub/.cache", "sub/deep"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("a.py", "sub/deep/b.py", ".git/config", ".git/objects/one", "sub/.cache/x", "sub/.env"):
        (tmp_path / name).write_text(f"{name}\n" * 9)
    for name in ("__init__.py", "sub/__init__.py"):
        (tmp_path / name).touch()
    found = files.expand([tmp_path])
    assert found == files.Found((tmp_path / "a.py", tmp_path / "sub/deep/b.py"), hidden=3, empty=2)
    assert found.notes == ("skipped 3 hidden files or folders and 2 empty files",)
    assert files.expand([tmp_path, tmp_path / "sub"]) == found, "each is counted once"
    assert files.expand([tmp_path / "sub/.env"]) == files.Found((tmp_path / "sub/.env",)), "one that is asked for"
    assert files.expand([tmp_path / "**/*.py"]) == files.Found(found.files, empty=2)
    config = files.FilesData.Config(root=str(tmp_path), fractions=(0.3, 0.3), seq_len=4)
    assert config.build().open(seed=0).notes == found.notes


def test_a_name_that_exists_is_no_pattern(tmp_path: Path) -> None:
    for name in ("a[1].py", "a1.py", "b*.py", "bb.py"):
        (tmp_path / name).write_text(name)
    (tmp_path / "run [1]").mkdir()
    (tmp_path / "run [1]" / "c.py").write_text("c")
    for name, expected in (("a[1].py", ["a[1].py"]), ("b*.py", ["b*.py"]), ("a[0-9].py", ["a1.py"])):
        assert [file.name for file in files.expand([tmp_path / name]).files] == expected
    assert [file.name for file in files.expand([tmp_path / "run [1]"]).files] == ["c.py"]


def test_a_home_that_is_none_is_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("~", "~nobody-of-this-name", "home"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
    assert files.expand(["~nobody-of-this-name"]).files == (tmp_path / "~nobody-of-this-name/a",)
    assert files.expand(["~/a"]).files == (tmp_path / "~/a",)
    (tmp_path / "~/a").unlink()
    assert files.expand(["~/a"]).files == (tmp_path / "home/a",)


def test_a_file_of_two_names_is_used_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    for name in "abc":
        (tmp_path / "data" / name).write_text(name * 50)
    (tmp_path / "linked").symlink_to("data")
    (tmp_path / "z").symlink_to("data/a")
    (tmp_path / "data" / "hard").hardlink_to(tmp_path / "data" / "b")
    monkeypatch.chdir(tmp_path)
    expected = tuple(tmp_path / "data" / name for name in "abc")
    given = ["data", "linked", "z", "./data/../data/a", str(tmp_path / "data/b"), "linked/c", "data/[ab]"]
    assert files.expand(given).files == expected
    assert files.expand(given[::-1]).files == expected
    joined = files.load(given, fractions=(0.1, 0.1))
    assert len(joined.train) + len(joined.validation) + len(joined.test) == 150


@pytest.mark.parametrize("options", [{"root": ""}, {"files": ("a", "")}])
def test_an_empty_name_is_not_the_working_directory(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        files.FilesData.Config(**options)
    with pytest.raises(ConfigError, match="root: must be"):
        stdlib.StdlibData.Config(root="")
    with pytest.raises(ConfigError, match="root: must be the folder of the"):
        enwik8.Enwik8Data.Config(root="").build().prepare()
