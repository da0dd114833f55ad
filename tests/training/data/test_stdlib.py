"""The standard library as text: what is in it, and how it is split."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sma.errors import DataError
from sma_models.training.data import stdlib
from sma_models.training.data.testing import DataSuite


class TestStdlib(DataSuite):
    config = stdlib.StdlibData.Config(seq_len=16, fractions=(0.2, 0.2))
    refused = (("seq_len", 0), ("fractions", (0.5, 0.5)))

    def write(self, root: Path) -> None:
        (root / "test").mkdir()
        (root / "test/test_left_out.py").write_text("raise SystemExit\n" * 100)
        for number in range(40):
            (root / f"module_{number}.py").write_text(f"def f_{number}(x):\n    return x + {number}\n" * 2)


def test_the_standard_library_is_split_by_file() -> None:
    splits = stdlib.load()
    parts = {
        name: {document for document, _ in getattr(splits, name).documents} for name in ("train", "validation", "test")
    }
    assert not parts["train"] & parts["test"]
    assert not parts["validation"] & (parts["train"] | parts["test"])
    everything = set.union(*parts.values())
    assert {"os.py", "json/decoder.py", "asyncio/tasks.py"} <= everything
    folders = {folder for name in everything for folder in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "encodings", "__pycache__"}
    sizes = {name: len(getattr(splits, name)) for name in parts}
    assert sum(sizes.values()) > 5_000_000
    assert 0.01 < sizes["validation"] / sum(sizes.values()) < 0.12
    assert 0.01 < sizes["test"] / sum(sizes.values()) < 0.12
    again = stdlib.load()
    assert (again.test.data == splits.test.data).all()
    assert again.test.documents == splits.test.documents
    first = splits.test.documents[0][0]
    assert (Path(sys.modules["os"].__file__ or "").parent / first).read_bytes()[:50] == splits.test.data[:50].tobytes()


def test_a_folder_without_source_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must contain the source files of the Python standard library"):
        stdlib.load(root=tmp_path)
