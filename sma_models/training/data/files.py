"""The bytes of any files, for a language model."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sma.errors import ConfigError, DataError
from sma_models.training.data.language import ByteData
from sma_models.training.data.reading import Pathlike, read_bytes, reject
from sma_models.training.data.streams import ByteStream, StreamSplits, split_bytes, split_files


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


class FilesData(ByteData):
    """The bytes of any files."""

    @dataclass(kw_only=True, frozen=True)
    class Config(ByteData.Config):
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

    def streams(self) -> StreamSplits:
        named = [self.config.root] if self.config.root else []
        patterns = [str(Path(pattern).expanduser()) for pattern in (*named, *self.config.files)]
        return load(patterns, split=self.config.split, fractions=self.config.fractions)
