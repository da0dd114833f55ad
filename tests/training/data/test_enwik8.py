"""Enwik8: its published size and splits."""

from __future__ import annotations

from pathlib import Path

import pytest

from sma.errors import DataError
from sma_models.training.data import enwik8
from sma_models.training.data.testing import Broken, DataSuite


class TestEnwik8(DataSuite):
    config = enwik8.Enwik8Data.Config(seq_len=16)
    refused = (("seq_len", 0), ("eval_seq_len", 0))
    broken = (
        Broken("enwik8", b"short", "must have 1000 bytes, got 5"),
        Broken("enwik8", None, "must contain 'enwik8' in one of .*, got none of them", "."),
    )

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A thousand bytes in place of a hundred million."""
        monkeypatch.setattr(enwik8, "SIZES", (900, 50, 50))

    def write(self, root: Path) -> None:
        (root / "enwik8").write_bytes(b"<mediawiki>" * 90 + b"0123456789")


def test_enwik8_must_have_its_published_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "enwik8").mkdir()
    (tmp_path / "enwik8/enwik8").write_bytes(bytes(range(100)))
    with pytest.raises(DataError, match="enwik8: must have 100000000 bytes, got 100"):
        enwik8.load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="must contain 'enwik8'"):
        enwik8.load(tmp_path / "empty")
    monkeypatch.setattr(enwik8, "SIZES", (90, 5, 5))
    for root in (tmp_path, tmp_path / "enwik8", tmp_path / "enwik8/enwik8"):
        splits = enwik8.load(root)
        assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [90, 5, 5]
        assert splits.test.data.tolist() == list(range(95, 100))
