"""Do two papers cite each other? Pairs of documents as bytes (the AAN task of Long Range Arena).

The release has ``new_aan_pairs.{train,eval,test}.tsv`` without a header: label, id 1, id 2, text 1, text 2, between
tabs and never quoted; the label is written ``0.0`` or ``1.0``.
"""

from __future__ import annotations

from dataclasses import dataclass

from sma.errors import ConfigError
from sma_models.training.data import long_range_arena
from sma_models.training.data.base import PaddedData, Task, classification
from sma_models.training.data.labelled import BYTE_PAD, PairDataset, Ragged, Splits
from sma_models.training.data.reading import Pathlike, find_folder, read_lines, reject

FILES = {
    "train": "new_aan_pairs.train.tsv",
    "validation": "new_aan_pairs.eval.tsv",
    "test": "new_aan_pairs.test.tsv",
}
PLACES = (".", "tsv_data", "aan", "retrieval", "lra_release/tsv_data", "lra_release/lra_release/tsv_data")
CLASSES = ("unrelated", "cited")


def read(path: Pathlike, max_length: int = 4000) -> PairDataset:
    """Read one file of pairs.

    Args:
        path: the file.
        max_length: longer documents keep their first ``max_length`` bytes.

    Raises:
        ConfigError: max_length is below 1.
        DataError: missing or empty file, a line without five columns, a label other than 0 and 1, an empty document, or
            text that is not UTF-8.
    """
    if max_length < 1:
        raise ConfigError(f"max_length: must be at least 1, got {max_length!r}")
    places: dict[bytes, int] = {}
    pairs: list[tuple[int, int]] = []
    labels: list[int] = []
    for number, line in read_lines(path):
        columns = line.split(b"\t")
        if len(columns) != 5:
            reject(path, f"line {number}: must be label, id, id, text, text between tabs", f"{len(columns)} columns")
        labels.append(_label(path, number, columns[0]))
        first, second = (_checked(path, number, text)[:max_length] for text in columns[3:])
        # A paper is in many pairs; it is kept once.
        pairs.append((places.setdefault(first, len(places)), places.setdefault(second, len(places))))
    return PairDataset(Ragged.join(places), pairs, labels, len(CLASSES), BYTE_PAD)


def _label(path: Pathlike, number: int, written: bytes) -> int:
    known = {b"0": 0, b"1": 1, b"0.0": 0, b"1.0": 1}
    if written not in known:
        reject(path, f"line {number}: the label must be 0 or 1", written[:40].decode("utf-8", "replace"))
    return known[written]


def _checked(path: Pathlike, number: int, text: bytes) -> bytes:
    if not text:
        reject(path, f"line {number}: a document must hold text", "an empty one")
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        reject(path, f"line {number}: must be text in UTF-8", f"byte {text[error.start]:#04x}")
    return text


def load(root: Pathlike, max_length: int = 4000) -> Splits[PairDataset]:
    """The whole task from ``root``, the folder of the files or one around it (errors as :func:`read`)."""
    folder = find_folder(root, PLACES, FILES["train"])
    parts = {name: read(folder / file, max_length) for name, file in FILES.items()}
    return Splits(
        train=parts["train"],
        validation=parts["validation"],
        test=parts["test"],
        max_length=max_length,
        classes=CLASSES,
    )


class RetrievalData(PaddedData):
    """Pairs of papers, byte by byte (ACL Anthology)."""

    release = long_range_arena.RELEASE

    @dataclass(kw_only=True, frozen=True)
    class Config(PaddedData.Config):
        max_length: int = 4000

    config: Config

    def open(self, *, seed: int) -> Task:
        return classification(load(self.prepare(), self.config.max_length), self.config.pad_to)
