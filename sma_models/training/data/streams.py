"""Streams of bytes, and how they are split in train, validation and test."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sma.errors import ConfigError, DataError
from sma_models.training.data.batches import Batch
from sma_models.training.data.reading import read_bytes
from sma_models.training.data.resident import Gather, Rows, upload

START = 10
"""The token before the first byte of a stream, a line feed, so that the vocabulary needs no extra entry."""
IGNORE = -100
"""The target where there is nothing to predict."""

WindowPlaces = tuple[NDArray[np.int64], NDArray[np.int64]]
"""The first byte and the number of targets of some windows."""


@dataclass(frozen=True)
class ByteStream:
    """Documents end to end.

    Attributes:
        data: (T,) uint8.
        documents: the name of each document and the byte at which it starts.
    """

    data: NDArray[np.uint8]
    documents: tuple[tuple[str, int], ...]

    @classmethod
    def join(cls, documents: Sequence[tuple[str, bytes]]) -> ByteStream:
        """Make a stream of (name, content) pairs."""
        starts = np.cumsum([0, *(len(content) for _, content in documents)])
        data = np.frombuffer(b"".join(content for _, content in documents), dtype=np.uint8)
        return cls(data, tuple((name, int(start)) for (name, _), start in zip(documents, starts, strict=False)))

    def __len__(self) -> int:
        return len(self.data)

    def cut(self, start: int, stop: int) -> ByteStream:
        """The bytes ``start`` .. ``stop - 1`` as a stream of their own."""
        ends = [first for _, first in self.documents[1:]] + [len(self)]
        inside = [
            (name, max(0, first - start))
            for (name, first), end in zip(self.documents, ends, strict=True)
            if first < stop and end > start
        ]
        return ByteStream(self.data[start:stop], tuple(inside))

    def window(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets (stop - start,) int64 that predict the bytes ``start`` .. ``stop - 1``."""
        targets = torch.from_numpy(self.data[start:stop].astype(np.int64))
        before = torch.tensor([START if start == 0 else int(self.data[start - 1])])
        return torch.cat([before, targets[:-1]]), targets

    def resident(self, place: Callable[[Sequence[int]], WindowPlaces], device: torch.device) -> Gather:
        """Upload the stream, to cut windows there.

        Args:
            place: where the windows of some numbers lie.
            device: where the bytes are kept.
        """
        flat = Rows(np.concatenate([np.array([START], dtype=np.uint8), self.data]), device)

        def gather(numbers: Sequence[int]) -> Batch:
            starts, lengths = place(numbers)
            width = int(lengths.max())
            first, there = upload(np.stack([starts, lengths]), device)
            both = flat.window(first, width + 1)
            tokens, targets = both[:, :-1], both[:, 1:]
            if (lengths == width).all():
                return {"tokens": tokens, "targets": targets, "valid": None, "lengths": None}
            valid = flat.mask(there, width)
            return {
                "tokens": tokens.masked_fill(~valid, 0),
                "targets": targets.masked_fill(~valid, IGNORE),
                "valid": valid,
                "lengths": there,
            }

        return gather


@dataclass(frozen=True, kw_only=True)
class StreamSplits:
    """The three parts of a language-modelling task, as streams; ``notes`` say what was passed over on the way."""

    train: ByteStream
    validation: ByteStream
    test: ByteStream
    notes: tuple[str, ...] = ()


def split_bytes(stream: ByteStream, fractions: tuple[float, float]) -> StreamSplits:
    """Cut a stream in train, validation and test, in this order.

    Args:
        stream: all bytes.
        fractions: the shares of validation and test.

    Raises:
        ConfigError: the fractions are out of range.
        DataError: a part of the split is empty.
    """
    _check_fractions(fractions)
    validation, test = (int(fraction * len(stream)) for fraction in fractions)
    first, second = len(stream) - validation - test, len(stream) - test
    return checked_splits(stream.cut(0, first), stream.cut(first, second), stream.cut(second, len(stream)))


def split_files(root: Path, names: Sequence[str], fractions: tuple[float, float]) -> StreamSplits:
    """Assign whole files to the parts by the SHA-256 of their names, so that adding a file moves no other one.

    Args:
        root: the folder that the names are relative to.
        names: of the files.
        fractions: the expected shares of validation and test.

    Raises:
        ConfigError: the fractions are out of range.
        DataError: a file is unreadable, or a part of the split is empty.
    """
    _check_fractions(fractions)
    parts: tuple[list[tuple[str, bytes]], ...] = ([], [], [])
    for name in names:
        content = read_bytes(root / name, allow_empty=True)
        if content:  # an empty file among many (a package marker) is no mistake
            parts[_part_of(name, fractions)].append((name, content))
    return checked_splits(*(ByteStream.join(part) for part in parts))


def _part_of(name: str, fractions: tuple[float, float]) -> int:
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return 1 if place < fractions[0] else 2 if place < sum(fractions) else 0


def _check_fractions(fractions: tuple[float, float]) -> None:
    if len(fractions) != 2 or min(fractions) <= 0.0 or sum(fractions) >= 1.0:
        raise ConfigError(f"fractions: must be two shares above 0 with a sum below 1, got {fractions!r}")


def checked_splits(train: ByteStream, validation: ByteStream, test: ByteStream) -> StreamSplits:
    """The three parts together.

    Raises:
        DataError: one of them is empty.
    """
    for name, part in (("train", train), ("validation", validation), ("test", test)):
        if not len(part):
            raise DataError(f"{name} split: must hold data, got none; name more or longer files")
    return StreamSplits(train=train, validation=validation, test=test)
