"""Map-style data sets and how their samples become batches.

Every data set knows its own ``collate``. The batches are plain dictionaries:

* ``tokens``: ``tokens (B, L)`` int64, ``valid (B, L)`` bool or None when nothing is padded, ``label (B,)`` int64;
* ``values``: the same with ``values (B, L)`` float32 in place of ``tokens``;
* ``pairs``: ``tokens (B, 2, L)``, ``valid (B, 2, L)`` or None, ``label (B,)``: two documents each;
* ``lm``: ``tokens (B, L)``, ``targets (B, L)`` int64, -100 where there is nothing to predict (see :mod:`.lm`).

Padding is always on the right.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from sma.errors import ConfigError
from sma_models.training.data.randomness import SPLIT, Draws

Item = dict[str, Any]
Batch = dict[str, Tensor | None]
Kind = Literal["tokens", "values", "pairs", "lm"]

BYTE_PAD = 256
"""The token that pads byte sequences; a vocabulary of bytes with padding has 257 entries."""


class Ragged:
    """Many sequences of numbers 0..255 kept end to end: one byte a token, whatever their number.

    Args:
        flat: (T,) uint8, all sequences one after the other.
        offsets: (N + 1,) int64, sequence i is ``flat[offsets[i]:offsets[i + 1]]``.
    """

    def __init__(self, flat: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        self.flat = flat
        self.offsets = offsets

    @classmethod
    def join(cls, rows: Iterable[bytes]) -> Ragged:
        """Keep a copy of every row."""
        kept = list(rows)
        offsets = np.zeros(len(kept) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in kept], out=offsets[1:])
        return cls(np.frombuffer(b"".join(kept), dtype=np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> NDArray[np.uint8]:
        """Sequence ``index`` (L_i,), a view."""
        return self.flat[self.offsets[index] : self.offsets[index + 1]]

    def tokens(self, index: int) -> Tensor:
        """Sequence ``index`` (L_i,) int64."""
        return torch.from_numpy(self.row(index).astype(np.int64))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(N,) the number of tokens of every sequence."""
        return np.diff(self.offsets)


class LabelledDataset(Dataset[Item]):
    """Samples with a class each; a subset shares the storage of the whole.

    Args:
        labels: (N,) the class of every stored sample.
        num_classes: how many classes there are.
    """

    kind: Kind
    vocab_size: int | None = None

    def __init__(self, labels: Sequence[int] | NDArray[np.int64], num_classes: int) -> None:
        self.labels = np.asarray(labels, dtype=np.int64)
        self.num_classes = num_classes
        self._index = np.arange(len(self.labels))

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Item:
        stored = int(self._index[index])
        return {**self.sample(stored), "label": int(self.labels[stored])}

    def subset(self, indices: Sequence[int] | NDArray[np.int64]) -> Self:
        """The samples ``indices`` of this data set as a data set of their own."""
        part = copy.copy(self)
        part._index = self._index[np.asarray(indices, dtype=np.int64)]
        return part

    def class_counts(self) -> NDArray[np.int64]:
        """(num_classes,) how many samples each class has."""
        return np.bincount(self.labels[self._index], minlength=self.num_classes)

    @abstractmethod
    def sample(self, stored: int) -> Item:
        """Everything but the label of the stored sample ``stored``."""

    @abstractmethod
    def collate(self, items: Sequence[Item]) -> Batch:
        """Make one batch of the samples ``items``."""


class TokenDataset(LabelledDataset):
    """Token sequences of different lengths: item ``{"tokens": (L_i,) int64, "label": int}``.

    Args:
        rows: the sequences.
        labels: (N,) their classes.
        num_classes: how many classes there are.
        pad: the token that fills up a batch; also the last entry of the vocabulary.
    """

    kind: Kind = "tokens"

    def __init__(self, rows: Ragged, labels: Sequence[int] | NDArray[np.int64], num_classes: int, pad: int) -> None:
        super().__init__(labels, num_classes)
        self.rows = rows
        self.pad = pad
        self.vocab_size = pad + 1

    def sample(self, stored: int) -> Item:
        return {"tokens": self.rows.tokens(stored)}

    def collate(self, items: Sequence[Item]) -> Batch:
        tokens, valid = pad_right([item["tokens"] for item in items], self.pad)
        return {"tokens": tokens, "valid": valid, "label": _labels(items)}


class PairDataset(LabelledDataset):
    """Pairs of documents: item ``{"tokens": ((L_1,), (L_2,)) int64, "label": int}``.

    Args:
        documents: the documents, each once.
        pairs: (N, 2) which two of them form each pair.
        labels: (N,) their classes.
        num_classes: how many classes there are.
        pad: the token that fills up a batch, in which all documents get one common length.
    """

    kind: Kind = "pairs"

    def __init__(
        self,
        documents: Ragged,
        pairs: Sequence[tuple[int, int]],
        labels: Sequence[int] | NDArray[np.int64],
        num_classes: int,
        pad: int,
    ) -> None:
        super().__init__(labels, num_classes)
        self.documents = documents
        self.pairs = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)
        self.pad = pad
        self.vocab_size = pad + 1

    def sample(self, stored: int) -> Item:
        first, second = self.pairs[stored]
        return {"tokens": (self.documents.tokens(first), self.documents.tokens(second))}

    def collate(self, items: Sequence[Item]) -> Batch:
        flat, valid = pad_right([document for item in items for document in item["tokens"]], self.pad)
        shape = (len(items), 2, flat.shape[1])
        return {
            "tokens": flat.view(shape),
            "valid": None if valid is None else valid.view(shape),
            "label": _labels(items),
        }


class ValueDataset(LabelledDataset):
    """Sequences of floats, all of one length: item ``{"values": (L,) float32, "label": int}``."""

    kind: Kind = "values"

    def collate(self, items: Sequence[Item]) -> Batch:
        return {"values": torch.stack([item["values"] for item in items]), "valid": None, "label": _labels(items)}


class PixelDataset(ValueDataset):
    """Grey images read row by row: (pixel / 255 - mean) / std.

    Args:
        pixels: (N, L) uint8.
        labels: (N,) their classes.
        num_classes: how many classes there are.
        mean: subtracted from the pixel in [0, 1].
        std: divides the rest.
    """

    def __init__(
        self, pixels: NDArray[np.uint8], labels: NDArray[np.int64], num_classes: int, mean: float, std: float
    ) -> None:
        super().__init__(labels, num_classes)
        self.pixels = pixels
        self.mean = mean
        self.std = std

    def sample(self, stored: int) -> Item:
        return {"values": normalise(self.pixels[stored], self.mean, self.std)}


def normalise(pixels: NDArray[np.uint8], mean: float, std: float) -> Tensor:
    """(pixels / 255 - mean) / std as float32, flattened to (L,)."""
    return torch.from_numpy((pixels.reshape(-1).astype(np.float32) / 255.0 - mean) / std).to(torch.float32)


def pad_right(rows: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor | None]:
    """Rows (L_i,) to ``tokens (B, L)`` and ``valid (B, L)``, which is None when all rows have the same length."""
    lengths = torch.tensor([row.numel() for row in rows])
    width = int(lengths.max())
    tokens = torch.full((len(rows), width), pad, dtype=torch.int64)
    for line, row in zip(tokens, rows, strict=True):
        line[: row.numel()] = row
    if bool((lengths == width).all()):
        return tokens, None
    return tokens, torch.arange(width) < lengths[:, None]


def _labels(items: Sequence[Item]) -> Tensor:
    return torch.tensor([item["label"] for item in items], dtype=torch.int64)


Part = TypeVar("Part", bound=LabelledDataset)


@dataclass(frozen=True, kw_only=True)
class Splits(Generic[Part]):
    """The three parts of a classification task.

    Attributes:
        train: what is learnt from.
        validation: what choices are made on; None when nothing was set aside.
        test: what is reported, once.
        max_length: no sample is longer.
        classes: the names of the classes, in the order of the labels.
    """

    train: Part
    validation: Part | None
    test: Part
    max_length: int
    classes: tuple[str, ...]


def set_aside(whole: Part, fraction: float, seed: int) -> tuple[Part, Part | None]:
    """Split ``whole`` in (the rest, a random ``fraction`` of it); the same seed always gives the same split.

    Raises:
        ConfigError: the fraction is not in [0, 1), or leaves one side empty.
    """
    if not 0.0 <= fraction < 1.0:
        raise ConfigError(f"validation_fraction: must be at least 0 and below 1, got {fraction!r}")
    if fraction == 0.0:
        return whole, None
    count = round(fraction * len(whole))
    if not 0 < count < len(whole):
        raise ConfigError(
            f"validation_fraction: must leave samples on both sides of {len(whole)} samples, got {fraction!r}"
        )
    order = Draws(seed, SPLIT).permutation(len(whole))
    return whole.subset(np.sort(order[count:])), whole.subset(np.sort(order[:count]))
