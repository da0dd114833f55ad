"""Byte-level language modelling; the vocabulary is the 256 bytes.

Three ways to cut a :class:`~sma_models.training.data.streams.ByteStream`:

* :class:`RandomWindows`, for training: window i starts at a random byte that depends on (seed, i) alone;
* :class:`Chunks`, for evaluation: windows side by side, every byte of the stream is a target exactly once;
* :class:`Lanes`, the same coverage for models that carry a state from one chunk to the next.

A target is the byte after its token. The first byte of a stream has none before it, and gets
:data:`~sma_models.training.data.streams.START` instead. :class:`ByteData` is the base of the plugins.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.utils.data import Dataset

from sma.errors import ConfigError, DataError
from sma_models.training.data.base import Data, Task
from sma_models.training.data.batches import Batch, Collating, Item, Kind
from sma_models.training.data.randomness import WINDOW, Draws
from sma_models.training.data.resident import Gather
from sma_models.training.data.streams import IGNORE, ByteStream, StreamSplits, WindowPlaces

VOCAB_SIZE = 256


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

    def resident(self, device: torch.device) -> Gather:
        """Upload the stream; see :class:`~sma_models.training.data.resident.Resident`."""

        def place(numbers: Sequence[int]) -> WindowPlaces:
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

    def resident(self, device: torch.device) -> Gather:
        """Upload the stream; see :class:`~sma_models.training.data.resident.Resident`."""

        def place(numbers: Sequence[int]) -> WindowPlaces:
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


class ByteData(Data):
    """What the language-modelling tasks share: random windows to train on, all bytes of a split to evaluate on."""

    @dataclass(kw_only=True, frozen=True)
    class Config(Data.Config):
        """How the bytes are cut.

        Attributes:
            seq_len: tokens in a training window.
            eval_seq_len: tokens that go through the model at once in an evaluation; None means ``seq_len``.
            carry_state: evaluate with the model's state carried from window to window, as when it generates; otherwise
                every window stands for itself.
        """

        seq_len: int = 512
        eval_seq_len: int | None = None
        carry_state: bool = False

        def __post_init__(self) -> None:
            self.require(self.seq_len >= 1, "seq_len", "must be at least 1")
            self.require(
                self.eval_seq_len is None or self.eval_seq_len >= 1, "eval_seq_len", "must be at least 1, or null"
            )

    config: Config

    @abstractmethod
    def streams(self) -> StreamSplits:
        """The bytes of the three splits."""

    def open(self, *, seed: int) -> Task:
        streams = self.streams()
        length = self.config.eval_seq_len or self.config.seq_len
        parts = {"train": streams.train, "validation": streams.validation, "test": streams.test}
        windows: dict[str, Collating] = {name: Chunks(part, length) for name, part in parts.items()}

        def lanes(split: str, batch_size: int) -> Lanes:
            return Lanes(parts[split], batch_size, length)

        return Task(
            "lm",
            RandomWindows(streams.train, self.config.seq_len, seed),
            windows,
            endless=True,
            vocab_size=VOCAB_SIZE,
            lanes=lanes if self.config.carry_state else None,
            text=partial(_text, parts),
            notes=streams.notes,
        )


def _text(parts: dict[str, ByteStream], split: str) -> bytes:
    return parts[split].data.tobytes()
