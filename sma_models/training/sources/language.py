"""Byte-level language modelling, as plugins of the kind ``data``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from sma_models.training.data import lm
from sma_models.training.data.batching import Collating
from sma_models.training.sources.base import Data, Task, released


class ByteText(Data):
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

    def streams(self) -> lm.StreamSplits:
        """The bytes of the three splits."""
        raise NotImplementedError

    def open(self, *, seed: int) -> Task:
        streams = self.streams()
        length = self.config.eval_seq_len or self.config.seq_len
        parts = {"train": streams.train, "validation": streams.validation, "test": streams.test}
        windows: dict[str, Collating] = {name: lm.Chunks(part, length) for name, part in parts.items()}

        def lanes(split: str, batch_size: int) -> lm.Lanes:
            return lm.Lanes(parts[split], batch_size, length)

        return Task(
            "lm",
            lm.RandomWindows(streams.train, self.config.seq_len, seed),
            windows,
            endless=True,
            vocab_size=lm.VOCAB_SIZE,
            lanes=lanes if self.config.carry_state else None,
            text=partial(_text, parts),
        )


def _text(parts: dict[str, lm.ByteStream], split: str) -> bytes:
    return parts[split].data.tobytes()


class Files(ByteText):
    """The bytes of any files."""

    @dataclass(kw_only=True, frozen=True)
    class Config(ByteText.Config):
        """Which files, and what is held out.

        Attributes:
            root: one file or folder, in place of ``files``.
            files: paths, folders and patterns (``**`` goes down).
            split: hold out the end of all ``bytes``, or whole ``files``, chosen by their names.
            fractions: shares of validation and test.
        """

        root: str | None = None
        files: tuple[str, ...] = ()
        split: Literal["bytes", "files"] = "bytes"
        fractions: tuple[float, float] = (0.05, 0.05)

    config: Config

    def streams(self) -> lm.StreamSplits:
        named = [self.config.root] if self.config.root else []
        patterns = [str(Path(pattern).expanduser()) for pattern in (*named, *self.config.files)]
        return lm.load(patterns, split=self.config.split, fractions=self.config.fractions)


class Stdlib(ByteText):
    """The source files of the Python standard library, split by file; there on every machine."""

    @dataclass(kw_only=True, frozen=True)
    class Config(ByteText.Config):
        """``root`` is the folder of a standard library; None takes that of the running Python."""

        root: str | None = None
        fractions: tuple[float, float] = (0.05, 0.05)

    config: Config

    def streams(self) -> lm.StreamSplits:
        return lm.load_stdlib(self.config.fractions, self.config.root)


class Enwik8(ByteText):
    """The first 100 million bytes of the English Wikipedia, 90 / 5 / 5 million as published."""

    @dataclass(kw_only=True, frozen=True)
    class Config(ByteText.Config):
        """``root`` is the file, its folder or the one around that; None downloads it."""

        root: str | None = None

    config: Config

    def prepare(self) -> Path:
        return released("enwik8", self.config.root)

    def streams(self) -> lm.StreamSplits:
        return lm.load_enwik8(self.prepare())
