"""Film reviews: what the reader gives, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from sma.errors import ConfigError, DataError
from sma_models.training.data import text
from sma_models.training.data.labelled import BYTE_PAD
from sma_models.training.data.testing import Broken, DataSuite


def write_reviews(root: Path) -> None:
    """Two splits of 2 x 10 reviews, in the layout of aclImdb."""
    for split in ("train", "test"):
        for label in ("neg", "pos"):
            folder = root / "aclImdb" / split / label
            folder.mkdir(parents=True)
            for number in range(10):
                (folder / f"{number}_{number}.txt").write_text(f"{split} {label} " + "é" * number, encoding="utf-8")


class TestText(DataSuite):
    config = text.TextData.Config(max_length=40)
    refused = (("max_length", 0), ("pad_to", 0), ("validation_fraction", 1.0))
    broken = (
        Broken("aclImdb/train/pos/3_3.txt", b"", "must hold data, got an empty file"),
        Broken("aclImdb/test/neg/4_4.txt", b"n\xe9", "must be text in UTF-8, got byte 0xe9 at 1"),
    )

    def write(self, root: Path) -> None:
        write_reviews(root)


def test_reviews_become_bytes(reviews: Path) -> None:
    splits = text.load(reviews, max_length=14, validation_fraction=0.25)
    assert (len(splits.train), len(splits.validation or []), len(splits.test)) == (15, 5, 20)
    assert splits.test.class_counts().tolist() == [10, 10]
    assert splits.test.document(3) == "neg/3_3.txt"
    item = splits.test[12]
    assert item["label"] == 1
    assert bytes(item["tokens"].tolist()) == "test pos éé".encode()[:14]
    assert len(splits.test[19]["tokens"]) == 14
    batch = splits.test.collate([splits.test[10], item])
    assert batch["tokens"] is not None
    assert batch["valid"] is not None
    assert batch["tokens"][0, 9:].tolist() == [BYTE_PAD] * 4
    assert batch["valid"].sum(1).tolist() == [9, 13]
    assert splits.test.vocab_size == 257


def test_the_validation_split_is_a_partition_that_the_seed_decides(reviews: Path) -> None:
    def parts(seed: int) -> tuple[set[str], set[str]]:
        splits = text.load(reviews, validation_fraction=0.3, seed=seed)
        assert splits.validation is not None
        train = {splits.train.document(i) for i in range(len(splits.train))}
        return train, {splits.validation.document(i) for i in range(len(splits.validation))}

    train, validation = parts(0)
    assert not train & validation
    assert len(train | validation) == 20
    assert parts(0) == (train, validation)
    assert parts(1)[1] != validation
    assert text.load(reviews, validation_fraction=0.0).validation is None


@pytest.mark.parametrize("fraction", [-0.1, 1.0, 0.001])
def test_a_fraction_that_leaves_an_empty_side_is_refused(reviews: Path, fraction: float) -> None:
    with pytest.raises(ConfigError, match="validation_fraction"):
        text.load(reviews, validation_fraction=fraction)


def test_bad_reviews_are_refused(reviews: Path) -> None:
    place = reviews / "aclImdb/train/pos/3_3.txt"
    place.write_bytes(b"")
    with pytest.raises(DataError, match=r"3_3\.txt: must hold data, got an empty file"):
        text.load(reviews)
    place.write_bytes("né".encode("latin-1"))
    with pytest.raises(DataError, match=r"3_3\.txt: must be text in UTF-8, got byte 0xe9 at 1"):
        text.load(reviews)
    for file in (reviews / "aclImdb/train/pos").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"pos: must contain \*\.txt files, got none"):
        text.load(reviews)
    (reviews / "aclImdb/train/pos").rmdir()
    with pytest.raises(DataError, match="pos: must be a readable folder"):
        text.load(reviews)
    with pytest.raises(ConfigError, match="max_length"):
        text.load(reviews, max_length=0)


def test_readers_never_write(reviews: Path) -> None:
    before = sorted(path.name for path in reviews.rglob("*"))
    text.load(reviews)
    assert sorted(path.name for path in reviews.rglob("*")) == before
