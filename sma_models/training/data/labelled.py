"""Samples with a class each, as map-style data sets, and how they become batches (see :mod:`.batches`)."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from sma.errors import ConfigError
from sma_models.training.data.batches import Batch, Item, Kind
from sma_models.training.data.randomness import SPLIT, Draws
from sma_models.training.data.resident import Gather, Rows, upload

Bytes = NDArray[np.uint8]

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

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(N,) the number of tokens of every sequence."""
        return np.diff(self.offsets)

    @cached_property
    def longest(self) -> int:
        """The length of the longest sequence."""
        return int(self.lengths.max(initial=0))

    def width(self, longest: int, pad_to: int) -> int:
        """Length of a padded batch: its longest row, rounded up to a multiple of ``pad_to`` but never beyond the
        longest row of all.
        """
        return min(-(-longest // pad_to) * pad_to, self.longest)


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


class PaddedDataset(LabelledDataset):
    """What data sets of sequences of different lengths share: batches padded on the right, here or on a device.

    Args:
        rows: the sequences.
        labels: (N,) the class of every sample.
        num_classes: how many classes there are.
        pad: the token that fills up a batch; also the last entry of the vocabulary.
    """

    def __init__(self, rows: Ragged, labels: Sequence[int] | NDArray[np.int64], num_classes: int, pad: int) -> None:
        super().__init__(labels, num_classes)
        self.rows = rows
        self.pad = pad
        self.vocab_size = pad + 1
        self.pad_to = 1

    def padded_to(self, multiple: int) -> Self:
        """The same samples, in batches as long as a multiple of this, or as the longest sample: in few shapes.

        Raises:
            ConfigError: the number is below 1.
        """
        if multiple < 1:
            raise ConfigError(f"pad_to: must be at least 1, got {multiple!r}")
        other = copy.copy(self)
        other.pad_to = multiple
        return other

    @abstractmethod
    def rows_of(self, stored: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which sequences the stored samples consist of, ``(B, ...)``."""

    def collate(self, items: Sequence[Item]) -> Batch:
        samples = [item["tokens"] if isinstance(item["tokens"], tuple) else (item["tokens"],) for item in items]
        rows = [row for sample in samples for row in sample]
        padded = pad_right(rows, self.pad, self.rows.width(max(row.numel() for row in rows), self.pad_to))
        shape = () if isinstance(items[0]["tokens"], Tensor) else (len(samples[0]),)
        return {
            **{name: None if t is None else t.view(-1, *shape, *t.shape[1:]) for name, t in padded.items()},
            "label": _labels(items),
        }

    @property
    def nbytes(self) -> int:
        """Size of all sequences."""
        return self.rows.flat.nbytes

    def resident(self, device: torch.device) -> Gather:
        """Upload all sequences; see :class:`~sma_models.training.data.resident.Resident`."""
        flat = Rows(self.rows.flat, device)

        def gather(numbers: Sequence[int]) -> Batch:
            stored = self._index[np.asarray(numbers)]
            which = self.rows_of(stored)
            shape, which = which.shape, which.reshape(-1)
            lengths = self.rows.lengths[which]
            width = self.rows.width(int(lengths.max()), self.pad_to)
            places = upload(np.concatenate([self.rows.offsets[which], lengths, self.labels[stored]]), device)
            starts, there, label = places[: which.size], places[which.size : 2 * which.size], places[2 * which.size :]
            tokens = flat.window(starts, width)
            if (lengths == width).all():
                return {"tokens": tokens.view(*shape, width), "valid": None, "lengths": None, "label": label}
            valid = flat.mask(there, width)
            return {
                "tokens": tokens.masked_fill_(~valid, self.pad).view(*shape, width),
                "valid": valid.view(*shape, width),
                "lengths": there.view(shape),
                "label": label,
            }

        return gather


class TokenDataset(PaddedDataset):
    """Token sequences of different lengths: item ``{"tokens": (L_i,) int64, "label": int}``."""

    kind: Kind = "tokens"

    def sample(self, stored: int) -> Item:
        return {"tokens": self.rows.tokens(stored)}

    def rows_of(self, stored: NDArray[np.int64]) -> NDArray[np.int64]:
        return stored


class PairDataset(PaddedDataset):
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
        super().__init__(documents, labels, num_classes, pad)
        self.pairs = np.asarray(pairs, dtype=np.int64).reshape(-1, 2)

    @property
    def documents(self) -> Ragged:
        """The documents, each once."""
        return self.rows

    def sample(self, stored: int) -> Item:
        first, second = self.pairs[stored]
        return {"tokens": (self.rows.tokens(first), self.rows.tokens(second))}

    def rows_of(self, stored: NDArray[np.int64]) -> NDArray[np.int64]:
        return self.pairs[stored]


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

    @property
    def nbytes(self) -> int:
        """Size of all images."""
        return self.pixels.nbytes

    def resident(self, device: torch.device) -> Gather:
        """Upload all images; see :class:`~sma_models.training.data.resident.Resident`."""
        pixels = upload(self.pixels.reshape(len(self.pixels), -1), device)
        # A table of the 256 values, so that they are the same on every device.
        table = normalise(np.arange(256, dtype=np.uint8), self.mean, self.std).to(device)

        def gather(numbers: Sequence[int]) -> Batch:
            stored = self._index[np.asarray(numbers)]
            place, label = upload(np.stack([stored, self.labels[stored]]), device)
            return {"values": table[pixels[place].int()], "valid": None, "label": label}

        return gather


def normalise(pixels: NDArray[np.uint8], mean: float, std: float) -> Tensor:
    """(pixels / 255 - mean) / std as float32, flattened to (L,)."""
    return torch.from_numpy((pixels.reshape(-1).astype(np.float32) / 255.0 - mean) / std).to(torch.float32)


def pad_right(rows: Sequence[Tensor], pad: int, width: int | None = None) -> dict[str, Tensor | None]:
    """Rows (L_i,) to ``tokens (B, L)``, ``valid (B, L)`` and ``lengths (B,)``; the latter two are None when all rows
    are as long as ``width``, by default the longest.
    """
    lengths = torch.tensor([row.numel() for row in rows])
    width = width or int(lengths.max())
    tokens = torch.full((len(rows), width), pad, dtype=torch.int64)
    for line, row in zip(tokens, rows, strict=True):
        line[: row.numel()] = row
    if bool((lengths == width).all()):
        return {"tokens": tokens, "valid": None, "lengths": None}
    return {"tokens": tokens, "valid": torch.arange(width) < lengths[:, None], "lengths": lengths}


def _labels(items: Sequence[Item]) -> Tensor:
    return torch.tensor([item["label"] for item in items], dtype=torch.int64)


Samples = TypeVar("Samples", bound=LabelledDataset)


@dataclass(frozen=True, kw_only=True)
class Splits(Generic[Samples]):
    """The three parts of a classification task.

    Attributes:
        train: what is learnt from.
        validation: what choices are made on; None when nothing was set aside.
        test: what is reported, once.
        max_length: no sample is longer.
        classes: the names of the classes, in the order of the labels.
    """

    train: Samples
    validation: Samples | None
    test: Samples
    max_length: int
    classes: tuple[str, ...]


def set_aside(whole: Samples, fraction: float, seed: int) -> tuple[Samples, Samples | None]:
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
