"""The source files of the Python standard library, for a language model; there on every machine."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

from sma_models.training.data.language import ByteData
from sma_models.training.data.reading import Pathlike, reject
from sma_models.training.data.streams import StreamSplits, split_files

EXCLUDED = frozenset(
    {
        *("site-packages", "dist-packages", "__pycache__", "lib-dynload"),  # not the library
        *("test", "tests", "idle_test"),  # not installed everywhere
        *("encodings", "pydoc_data"),  # generated tables and generated text, not code that people wrote
    }
)


def load(fractions: tuple[float, float] = (0.05, 0.05), root: Pathlike | None = None) -> StreamSplits:
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
    return not generated and EXCLUDED.isdisjoint(parts[:-1]) and path.is_file()


class StdlibData(ByteData):
    """The source files of the Python standard library, split by file; there on every machine."""

    @dataclass(kw_only=True, frozen=True)
    class Config(ByteData.Config):
        """``root`` is the folder of a standard library; None takes that of the running Python."""

        root: str | None = None
        fractions: tuple[float, float] = (0.05, 0.05)

        def __post_init__(self) -> None:
            super().__post_init__()
            self.require(self.root != "", "root", "must be a folder, or null")

    config: Config

    def streams(self) -> StreamSplits:
        return load(self.config.fractions, self.config.root)
