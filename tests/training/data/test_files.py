"""Any files: how they are found and split, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from sma.errors import ConfigError, DataError
from sma_models.training.data import files
from sma_models.training.data.testing import Broken, DataSuite


class TestFiles(DataSuite):
    config = files.FilesData.Config(seq_len=16, fractions=(0.1, 0.1))
    refused = (("seq_len", 0), ("eval_seq_len", 0), ("fractions", (0.0, 0.1)))
    broken = (Broken("b.txt", b"", "must hold data, got an empty file"),)

    def write(self, root: Path) -> None:
        for name in "abc":
            (root / f"{name}.txt").write_text("".join(f"{name}: line {n}\n" for n in range(40)))


class TestWholeFiles(TestFiles):
    config = files.FilesData.Config(seq_len=16, split="files", fractions=(0.3, 0.3), carry_state=True)
    broken = ()

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
    with pytest.raises(DataError, match="train split: must hold data"):
        files.load([tmp_path], split="files")
    (tmp_path / "a.txt").write_bytes(b"abc")
    with pytest.raises(DataError, match="validation split: must hold data"):
        files.load([tmp_path])
