"""The bytes of any files, for a language model."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from sma.errors import ConfigError, DataError
from sma_models.training.data.language import ByteData
from sma_models.training.data.reading import Pathlike, named_place, read_bytes, reject
from sma_models.training.data.streams import ByteStream, StreamSplits, split_bytes, split_files


@dataclass(frozen=True)
class Found:
    """The files that patterns name.

    Attributes:
        files: their real paths, sorted; each file once, whatever names lead to it.
        hidden: hidden files and folders that were passed over.
        empty: files without content that were passed over.
    """

    files: tuple[Path, ...]
    hidden: int = 0
    empty: int = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What was passed over, in words."""
        skipped = [(self.hidden, "hidden file or folder"), (self.empty, "empty file")]
        counted = [
            f"{count} {what if count == 1 else what.replace(' or ', 's or ') + 's'}" for count, what in skipped if count
        ]
        return (f"skipped {' and '.join(counted)}",) if counted else ()


def expand(patterns: Sequence[Pathlike]) -> Found:
    """The files that paths, folders (everything below them) and globs (``**`` goes down) name.

    A name that exists is taken as it is; only another one is a pattern. What is hidden in a folder, and what is empty
    among other files, is passed over and counted.

    Raises:
        DataError: a pattern names no file, or every file is empty.
    """
    named: dict[tuple[int, int], Path] = {}
    hidden: set[Path] = set()
    for pattern in patterns:
        files = list(_named(pattern, hidden))
        if not files:
            reject(pattern, "must name at least one file", "none")
        for file in sorted(Path(os.path.realpath(each)) for each in files):
            status = file.stat()
            known = named.setdefault((status.st_dev, status.st_ino), file)  # a hard link is another name, too
            named[status.st_dev, status.st_ino] = min(known, file)
    if not named:
        raise DataError("files: must name at least one file, got an empty list")
    files = sorted(named.values())
    full = tuple(file for file in files if file.stat().st_size)
    if not full:
        reject(files[0], "must hold data", "an empty file")
    return Found(full, len(hidden), len(files) - len(full))


def _named(pattern: Pathlike, hidden: set[Path]) -> Iterator[Path]:
    """The files of one pattern; adds what it passes over to ``hidden``."""
    place = named_place(pattern)
    if place.is_dir():
        for folder, folders, names in os.walk(place):
            below = Path(folder)
            hidden.update(below.resolve() / name for name in (*folders, *names) if name.startswith("."))
            folders[:] = [name for name in folders if not name.startswith(".")]
            yield from (below / name for name in names if not name.startswith(".") and (below / name).is_file())
    elif os.path.lexists(place):
        if place.is_file():
            yield place
    else:
        yield from (Path(name) for name in glob.glob(str(place), recursive=True) if os.path.isfile(name))


def load(
    patterns: Sequence[Pathlike],
    *,
    split: Literal["files", "bytes"] = "bytes",
    fractions: tuple[float, float] = (0.05, 0.05),
) -> StreamSplits:
    """The bytes of any files.

    Args:
        patterns: paths, folders or globs; the files are read in the order of their real paths.
        split: "bytes" holds out the end of the whole stream; "files" holds out whole files, chosen by a hash of their
            paths below the folder that they share, so that adding a file there moves no other one.
        fractions: the shares of validation and test: exact for "bytes", expected ones for "files".

    Raises:
        ConfigError: an argument is out of range.
        DataError: nothing is named, a file is unreadable, all are empty, or a part of the split is.
    """
    found = expand(patterns)
    files = found.files
    if split == "files":
        common = Path(os.path.commonpath([path.parent for path in files]))
        splits = split_files(common, [path.relative_to(common).as_posix() for path in files], fractions)
    elif split == "bytes":
        splits = split_bytes(ByteStream.join([(str(path), read_bytes(path)) for path in files]), fractions)
    else:
        raise ConfigError(f"split: must be 'files' or 'bytes', got {split!r}")
    return replace(splits, notes=found.notes)


class FilesData(ByteData):
    """The bytes of any files."""

    @dataclass(kw_only=True, frozen=True)
    class Config(ByteData.Config):
        """Which files, and what is held out.

        Attributes:
            root: one file or folder, in place of ``files``.
            files: paths, folders and patterns (``**`` goes down). A name that exists is no pattern.
            split: hold out the end of all ``bytes``, or whole ``files``, chosen by their names.
            fractions: shares of validation and test.
        """

        root: str | None = None
        files: tuple[str, ...] = ()
        split: Literal["bytes", "files"] = "bytes"
        fractions: tuple[float, float] = (0.05, 0.05)

        def __post_init__(self) -> None:
            super().__post_init__()
            self.require(self.root != "", "root", "must be a file or folder, or null")
            self.require("" not in self.files, "files", "must hold names of files, none of them empty")

    config: Config

    def streams(self) -> StreamSplits:
        named = () if self.config.root is None else (self.config.root,)
        return load((*named, *self.config.files), split=self.config.split, fractions=self.config.fractions)
