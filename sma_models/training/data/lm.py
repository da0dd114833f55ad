"""Byte-level language modelling over any files; the vocabulary is the 256 bytes.

A :class:`ByteStream` is documents end to end, nothing between them. Three ways to cut it:

* :class:`RandomWindows`, for training: window i starts at a random byte that depends on (seed, i) alone;
* :class:`Chunks`, for evaluation: windows side by side, every byte of the stream is a target exactly once;
* :class:`Lanes`, the same coverage for models that carry a state from one chunk to the next.

A target is the byte after its token. The first byte of a stream has none before it, and gets :data:`START` instead.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from sma.errors import ConfigError, DataError
from sma_models.training.data.datasets import Batch, Item, Kind
from sma_models.training.data.files import Pathlike, find_folder, read_bytes, reject
from sma_models.training.data.randomness import WINDOW, Draws
from sma_models.training.data.resident import Reader, Rows, upload

VOCAB_SIZE = 256
START = 10
"""The token before the first byte of a stream, a line feed, so that the vocabulary needs no extra entry."""
IGNORE = -100
"""The target where there is nothing to predict."""

ENWIK8_SIZES = (90_000_000, 5_000_000, 5_000_000)


Places = tuple[NDArray[np.int64], NDArray[np.int64]]
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

    def resident(self, place: Callable[[Sequence[int]], Places], device: torch.device) -> Reader:
        """Upload the stream, to cut windows there.

        Args:
            place: where the windows of some numbers lie.
            device: where the bytes are kept.
        """
        flat = Rows(np.concatenate([np.array([START], dtype=np.uint8), self.data]), device)

        def read(numbers: Sequence[int]) -> Batch:
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

        return read


@dataclass(frozen=True, kw_only=True)
class StreamSplits:
    """The three parts of a language-modelling task, as streams."""

    train: ByteStream
    validation: ByteStream
    test: ByteStream


class RandomWindows(Dataset[Item]):
    """Endless training windows of ``seq_len`` tokens; use with ``BatchPlan(None, batch_size)``.

    Args:
        stream: where they are cut from.
        seq_len: tokens in a window, which reads ``seq_len + 1`` bytes.
        seed: decides the places; window i is a pure function of (stream, seq_len, seed, i).

    Raises:
        ConfigError: seq_len is below 1.
        DataError: the stream is too short for one window.
    """

    kind: Kind = "lm"
    vocab_size = VOCAB_SIZE

    def __init__(self, stream: ByteStream, seq_len: int, seed: int = 0) -> None:
        _check_length(stream, seq_len)
        if len(stream) < seq_len + 1:
            raise DataError(f"stream: must have at least seq_len + 1 = {seq_len + 1} bytes, got {len(stream)}")
        self.stream = stream
        self.seq_len = seq_len
        self.seed = seed

    def __len__(self) -> int:
        """Windows that together are as long as the stream; any index from 0 upwards is allowed all the same."""
        return max(1, len(self.stream) // self.seq_len)

    def __getitem__(self, index: int) -> Item:
        if index < 0:
            raise IndexError(f"window: must be at least 0, got {index}")
        start = self._start(index)
        tokens, targets = self.stream.window(start, start + self.seq_len)
        return {"tokens": tokens, "targets": targets}

    def _start(self, index: int) -> int:
        return 1 + int(Draws(self.seed, WINDOW, index).below(len(self.stream) - self.seq_len, 1)[0])

    def collate(self, items: Sequence[Item]) -> Batch:
        return collate_windows(items)

    @property
    def nbytes(self) -> int:
        """Size of the stream."""
        return self.stream.data.nbytes

    def resident(self, device: torch.device) -> Reader:
        """Upload the stream; see :class:`~sma_models.training.data.resident.Resident`."""

        def place(numbers: Sequence[int]) -> Places:
            starts = np.array([self._start(number) for number in numbers])
            return starts, np.full_like(starts, self.seq_len)

        return self.stream.resident(place, device)


class Chunks(Dataset[Item]):
    """The stream in windows side by side; the last one may be shorter and is padded in its batch.

    Args:
        stream: what is evaluated.
        seq_len: tokens in a window.

    Raises:
        ConfigError: seq_len is below 1.
        DataError: the stream is empty.
    """

    kind: Kind = "lm"
    vocab_size = VOCAB_SIZE

    def __init__(self, stream: ByteStream, seq_len: int) -> None:
        _check_length(stream, seq_len)
        self.stream = stream
        self.seq_len = seq_len

    def __len__(self) -> int:
        return -(-len(self.stream) // self.seq_len)

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(f"chunk: must be at least 0 and below {len(self)}, got {index}")
        start = index * self.seq_len
        tokens, targets = self.stream.window(start, min(start + self.seq_len, len(self.stream)))
        return {"tokens": tokens, "targets": targets}

    def collate(self, items: Sequence[Item]) -> Batch:
        return collate_windows(items)

    @property
    def nbytes(self) -> int:
        """Size of the stream."""
        return self.stream.data.nbytes

    def resident(self, device: torch.device) -> Reader:
        """Upload the stream; see :class:`~sma_models.training.data.resident.Resident`."""

        def place(numbers: Sequence[int]) -> Places:
            starts = np.asarray(numbers) * self.seq_len
            return starts, np.minimum(len(self.stream) - starts, self.seq_len)

        return self.stream.resident(place, device)


class Lanes(Dataset[Batch]):
    """Whole batches for models with a state: row b of batch k + 1 goes on where row b of batch k stopped.

    The stream is cut into ``batch_size`` lanes of equal length (the last ones may be shorter). Start with no state at
    batch 0; a row that is all padding has ended. Give it to a loader with ``batch_size=None``.

    Args:
        stream: what is read.
        batch_size: number of lanes.
        seq_len: tokens of each lane in a batch.

    Raises:
        ConfigError: a size is below 1.
        DataError: the stream is empty.
    """

    kind: Kind = "lm"
    vocab_size = VOCAB_SIZE

    def __init__(self, stream: ByteStream, batch_size: int, seq_len: int) -> None:
        _check_length(stream, seq_len)
        if batch_size < 1:
            raise ConfigError(f"batch_size: must be at least 1, got {batch_size!r}")
        self.stream = stream
        self.batch_size = batch_size
        self.seq_len = seq_len
        self.lane_length = -(-len(stream) // batch_size)

    def __len__(self) -> int:
        return -(-self.lane_length // self.seq_len)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"batch: must be at least 0 and below {len(self)}, got {index}")
        items = []
        width = min(self.seq_len, self.lane_length - index * self.seq_len)
        for lane in range(self.batch_size):
            end = min((lane + 1) * self.lane_length, len(self.stream))
            start = min(lane * self.lane_length + index * self.seq_len, end)
            empty = torch.empty(0, dtype=torch.int64)
            tokens, targets = self.stream.window(start, min(start + width, end)) if start < end else (empty, empty)
            items.append({"tokens": tokens, "targets": targets})
        return collate_windows(items)


def collate_windows(items: Sequence[Item]) -> Batch:
    """Windows to ``tokens (B, L)`` padded with 0, ``targets`` padded with -100, ``valid`` and ``lengths`` (None if
    nothing is padded).
    """
    lengths = torch.tensor([item["tokens"].numel() for item in items])
    shape = (len(items), int(lengths.max()))
    tokens, targets = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE)
    for row, item in enumerate(items):
        tokens[row, : lengths[row]] = item["tokens"]
        targets[row, : lengths[row]] = item["targets"]
    if bool((lengths == shape[1]).all()):
        return {"tokens": tokens, "targets": targets, "valid": None, "lengths": None}
    valid = torch.arange(shape[1]) < lengths[:, None]
    return {"tokens": tokens, "targets": targets, "valid": valid, "lengths": lengths}


def _check_length(stream: ByteStream, seq_len: int) -> None:
    if seq_len < 1:
        raise ConfigError(f"seq_len: must be at least 1, got {seq_len!r}")
    if not len(stream):
        raise DataError("stream: must hold data, got an empty one")


def expand(patterns: Sequence[Pathlike]) -> list[Path]:
    """The files that paths, folders (everything below them) and globs (``**`` goes down) name; sorted, each once.

    Raises:
        DataError: a pattern names no file.
    """
    found: set[Path] = set()
    for pattern in patterns:
        if os.path.isdir(pattern):
            files = [path for path in Path(pattern).rglob("*") if path.is_file()]
        else:
            files = [Path(name) for name in glob.glob(os.fspath(pattern), recursive=True) if os.path.isfile(name)]
        if not files:
            reject(pattern, "must name at least one file", "none")
        found.update(files)
    if not found:
        raise DataError("files: must name at least one file, got an empty list")
    return sorted(found)


def load(
    patterns: Sequence[Pathlike],
    *,
    split: Literal["files", "bytes"] = "bytes",
    fractions: tuple[float, float] = (0.05, 0.05),
) -> StreamSplits:
    """The bytes of any files.

    Args:
        patterns: paths, folders or globs; the files are read in sorted order.
        split: "bytes" holds out the end of the whole stream; "files" holds out whole files, chosen by a hash of their
            paths below the folder that they share, so that adding a file there moves no other one.
        fractions: the shares of validation and test: exact for "bytes", expected ones for "files".

    Raises:
        ConfigError: an argument is out of range.
        DataError: nothing is named, a file is unreadable or empty, or a part of the split is empty.
    """
    files = expand(patterns)
    if split == "files":
        common = Path(os.path.commonpath([path.absolute().parent for path in files]))
        return split_files(common, [path.absolute().relative_to(common).as_posix() for path in files], fractions)
    if split != "bytes":
        raise ConfigError(f"split: must be 'files' or 'bytes', got {split!r}")
    return split_bytes(ByteStream.join([(str(path), read_bytes(path)) for path in files]), fractions)


def split_bytes(stream: ByteStream, fractions: tuple[float, float]) -> StreamSplits:
    """Cut a stream in train, validation and test, in this order (errors as :func:`load`)."""
    _check_fractions(fractions)
    validation, test = (int(fraction * len(stream)) for fraction in fractions)
    first, second = len(stream) - validation - test, len(stream) - test
    return _checked(stream.cut(0, first), stream.cut(first, second), stream.cut(second, len(stream)))


def split_files(root: Path, names: Sequence[str], fractions: tuple[float, float]) -> StreamSplits:
    """Give whole files below ``root`` to the parts by the SHA-256 of their names (errors as :func:`load`)."""
    _check_fractions(fractions)
    parts: tuple[list[tuple[str, bytes]], ...] = ([], [], [])
    for name in names:
        content = read_bytes(root / name, allow_empty=True)
        if content:  # an empty file among many (a package marker) is no mistake
            parts[_part_of(name, fractions)].append((name, content))
    return _checked(*(ByteStream.join(part) for part in parts))


def _part_of(name: str, fractions: tuple[float, float]) -> int:
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    return 1 if place < fractions[0] else 2 if place < sum(fractions) else 0


def _check_fractions(fractions: tuple[float, float]) -> None:
    if len(fractions) != 2 or min(fractions) <= 0.0 or sum(fractions) >= 1.0:
        raise ConfigError(f"fractions: must be two shares above 0 with a sum below 1, got {fractions!r}")


def _checked(train: ByteStream, validation: ByteStream, test: ByteStream) -> StreamSplits:
    for name, part in (("train", train), ("validation", validation), ("test", test)):
        if not len(part):
            raise DataError(f"{name} split: must hold data, got none; name more or longer files")
    return StreamSplits(train=train, validation=validation, test=test)


def load_enwik8(root: Pathlike) -> StreamSplits:
    """The first 100,000,000 bytes of the English Wikipedia, split 90 M / 5 M / 5 M as published.

    Args:
        root: the file, its folder or the folder around that.

    Raises:
        DataError: the file is missing or has another size.
    """
    path = Path(root)
    if not path.is_file():
        path = find_folder(root, (".", "enwik8"), "enwik8") / "enwik8"
        path = path / "enwik8" if path.is_dir() else path
    content = read_bytes(path)
    if len(content) != sum(ENWIK8_SIZES):
        reject(path, f"must have {sum(ENWIK8_SIZES)} bytes", len(content))
    stream = ByteStream.join([("enwik8", content)])
    first, second = ENWIK8_SIZES[0], ENWIK8_SIZES[0] + ENWIK8_SIZES[1]
    return _checked(stream.cut(0, first), stream.cut(first, second), stream.cut(second, len(stream)))


STDLIB_EXCLUDED = frozenset(
    {
        *("site-packages", "dist-packages", "__pycache__", "lib-dynload"),  # not the library
        *("test", "tests", "idle_test"),  # not installed everywhere
        *("encodings", "pydoc_data"),  # generated tables and generated text, not code that people wrote
    }
)


def load_stdlib(fractions: tuple[float, float] = (0.05, 0.05), root: Pathlike | None = None) -> StreamSplits:
    """The source files of the standard library of the running Python, split by file.

    The same version of Python gives the same streams on every machine: tests (which not every installation has),
    installed packages, generated tables and files named after the machine are left out.

    Args:
        fractions: expected shares of validation and test.
        root: the folder of the library; None finds that of the running Python.

    Raises:
        ConfigError: the fractions are out of range.
        DataError: the folder has no source files.
    """
    folder = Path(sysconfig.get_paths()["stdlib"] if root is None else root)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py") if _is_library(path, folder))
    if not names:
        reject(folder, "must contain the source files of the Python standard library (*.py)", "none")
    return split_files(folder, names, fractions)


def _is_library(path: Path, folder: Path) -> bool:
    parts = path.relative_to(folder).parts
    generated = any(part.startswith(("_sysconfigdata", "config-")) for part in parts)
    return not generated and STDLIB_EXCLUDED.isdisjoint(parts[:-1]) and path.is_file()
