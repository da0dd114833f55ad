"""Pairs of papers: what the reader gives, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from sma.errors import DataError
from sma_models.training.data import retrieval
from sma_models.training.data.testing import Broken, DataSuite


class TestRetrieval(DataSuite):
    config = retrieval.RetrievalData.Config(max_length=20)
    refused = (("max_length", 0), ("pad_to", 0))
    broken = (
        Broken("new_aan_pairs.eval.tsv", b"", "must hold data, got an empty file"),
        Broken("new_aan_pairs.test.tsv", b"2.0\tA\tB\tx\ty\n", "line 1: the label must be 0 or 1, got 2.0"),
        Broken("new_aan_pairs.train.tsv", b"1.0\tA\n", "line 1: must be label, id, id, text, text .*, got 2 columns"),
    )

    def write(self, root: Path) -> None:
        for split, name in retrieval.FILES.items():
            lines = [pair_line(f"{n % 2}.0", f"{split} {n}", "another" * (n % 4 + 1)) for n in range(6)]
            (root / name).write_text("".join(lines))


def pair_line(label: str = "1.0", first: str = "eins", second: str = "zwei") -> str:
    return f"{label}\tA\tB\t{first}\t{second}\n"


def write_pairs(folder: Path) -> None:
    for name in retrieval.FILES.values():
        (folder / name).write_text(pair_line() + pair_line("0.0", "eins", 'dr"ei') + pair_line("0", "lang" * 9))


def test_pairs_share_their_documents(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    splits = retrieval.load(tmp_path, max_length=10)
    assert splits.train.labels.tolist() == [1, 0, 0]
    assert len(splits.train.documents) == 4
    batch = splits.train.collate([splits.train[i] for i in range(3)])
    assert batch["tokens"] is not None
    assert batch["valid"] is not None
    assert batch["tokens"].shape == (3, 2, 10)
    assert bytes(batch["tokens"][1, 1, :5].tolist()) == b'dr"ei'
    assert batch["valid"].sum(-1).tolist() == [[4, 4], [4, 5], [10, 4]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must hold data"),
        (b"1.0\tA\tB\teins\n", "line 1: must be label, id, id, text, text between tabs, got 4 columns"),
        (pair_line("2.0").encode(), "line 1: the label must be 0 or 1, got 2.0"),
        (pair_line(first="").encode(), "line 1: a document must hold text"),
        (pair_line(first="é").encode("latin-1"), "line 1: must be text in UTF-8, got byte 0xe9"),
    ],
)
def test_bad_pairs_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    write_pairs(tmp_path)
    (tmp_path / retrieval.FILES["validation"]).write_bytes(content)
    with pytest.raises(DataError, match=rf"new_aan_pairs\.eval\.tsv: {message}"):
        retrieval.load(tmp_path)
