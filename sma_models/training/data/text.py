"""Byte-level sentiment of film reviews, in the layout of aclImdb_v1 (Maas et al. 2011).

``root/{train,test}/{neg,pos}/*.txt``, one review a file; 25,000 + 25,000 in the official release.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from sma.errors import ConfigError
from sma_models.training.data.base import PaddedData, Task, classification
from sma_models.training.data.labelled import BYTE_PAD, Ragged, Splits, TokenDataset, set_aside
from sma_models.training.data.reading import Pathlike, find_folder, list_files, read_bytes, reject
from sma_models.training.data.release import Release, Resource

RELEASE = Release(
    name="text",
    folder="aclImdb",
    resources=(
        Resource(
            url="https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
            known_hash="md5:7c2ac02c03563afcf9b574c7e56c153a",
            unpack="tar",
            top="aclImdb",
        ),
    ),
    licence="none stated; its makers ask to cite Maas et al. 2011",
)
CLASSES = ("neg", "pos")
PLACES = (".", "aclImdb")


class Reviews(TokenDataset):
    """Reviews as bytes (padded with :data:`~.labelled.BYTE_PAD`).

    Attributes:
        documents: the file of every stored sample, relative to the folder of the split.
    """

    documents: tuple[str, ...] = ()

    def document(self, index: int) -> str:
        """The file that sample ``index`` comes from."""
        return self.documents[int(self._index[index])]


def read(folder: Pathlike, max_length: int = 4000) -> Reviews:
    """Read one split: ``folder/neg/*.txt`` and ``folder/pos/*.txt``, in the order of their names.

    Args:
        folder: the folder of the split.
        max_length: longer reviews keep their first ``max_length`` bytes.

    Raises:
        ConfigError: max_length is below 1.
        DataError: a folder is missing or has no reviews; a file is empty, unreadable or not in UTF-8.
    """
    if max_length < 1:
        raise ConfigError(f"max_length: must be at least 1, got {max_length!r}")
    rows: list[bytes] = []
    labels: list[int] = []
    documents: list[str] = []
    for label, name in enumerate(CLASSES):
        place = os.path.join(folder, name)
        for file in list_files(place, ".txt"):
            rows.append(_read_review(os.path.join(place, file))[:max_length])
            labels.append(label)
            documents.append(f"{name}/{file}")
    reviews = Reviews(Ragged.join(rows), labels, len(CLASSES), BYTE_PAD)
    reviews.documents = tuple(documents)
    return reviews


def _read_review(path: str) -> bytes:
    content = read_bytes(path)
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        reject(path, "must be text in UTF-8", f"byte {content[error.start]:#04x} at {error.start}")
    return content


def load(root: Pathlike, *, max_length: int = 4000, validation_fraction: float = 0.1, seed: int = 0) -> Splits[Reviews]:
    """The whole task from ``root`` (``aclImdb`` or the folder around it).

    Args:
        root: where the data lie.
        max_length: longer reviews are cut.
        validation_fraction: share of the training reviews set aside; 0 trains on all of them and gives no validation.
        seed: decides which ones.

    Raises:
        ConfigError: an argument is out of range.
        DataError: see :func:`read`.
    """
    folder = find_folder(root, PLACES, "train")
    train, validation = set_aside(read(folder / "train", max_length), validation_fraction, seed)
    test = read(folder / "test", max_length)
    return Splits(train=train, validation=validation, test=test, max_length=max_length, classes=CLASSES)


class TextData(PaddedData):
    """Sentiment of film reviews, byte by byte (aclImdb)."""

    release = RELEASE

    @dataclass(kw_only=True, frozen=True)
    class Config(PaddedData.Config):
        max_length: int = 4000
        validation_fraction: float = 0.1
        seed: int = 0

    config: Config

    def open(self, *, seed: int) -> Task:
        c = self.config
        root = self.prepare()
        return classification(
            load(root, max_length=c.max_length, validation_fraction=c.validation_fraction, seed=c.seed), c.pad_to
        )
