"""Reading files with errors that name the file, the rule and the value."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from sma.errors import DataError

Pathlike = str | os.PathLike[str]


def reject(path: Pathlike, rule: str, value: Any) -> NoReturn:
    """Raise the :class:`~sma.errors.DataError` of a data file: ``path: rule, got value``."""
    text = value if isinstance(value, str) else repr(value)
    raise DataError(f"{os.fspath(path)}: {rule}, got {text if len(text) <= 120 else text[:120] + '...'}")


def named_place(name: Pathlike) -> Path:
    """The path that a name means: as it is where it exists, else with ``~`` standing for the folder of a user."""
    return Path(name) if os.path.lexists(name) else Path(os.path.expanduser(name))


def read_bytes(path: Pathlike, allow_empty: bool = False) -> bytes:
    """The whole content of a file.

    Raises:
        DataError: the file is missing, a folder, unreadable, or empty without ``allow_empty``.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        reject(path, "must be a readable file", error.strerror or str(error))
    if not content and not allow_empty:
        reject(path, "must hold data", "an empty file")
    return content


def read_lines(path: Pathlike) -> Iterator[tuple[int, bytes]]:
    """The lines of a text file as (number from 1, bytes without the line end); empty lines are left out.

    Raises:
        DataError: the file is missing, unreadable or empty.
    """
    found = False
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                stripped = line.rstrip(b"\r\n")
                if stripped:
                    found = True
                    yield number, stripped
    except OSError as error:
        reject(path, "must be a readable file", error.strerror or str(error))
    if not found:
        reject(path, "must hold data", "an empty file")


def find_folder(root: Pathlike, below: Iterable[str], wanted: str) -> Path:
    """The first of ``root/below[i]`` in which ``wanted`` exists: ``root`` may also be the folder around the data.

    Raises:
        DataError: there is no such folder, naming every place that was looked at.
    """
    base = Path(root)
    if not base.is_dir():
        reject(base, "must be a folder", "a file" if base.exists() else "nothing there")
    places = [base / part for part in below]
    for place in places:
        if (place / wanted).exists():
            return place
    reject(base, f"must contain {wanted!r} in one of {[str(place) for place in places]}", "none of them")


def list_files(folder: Pathlike, suffix: str) -> list[str]:
    """The sorted names of the files in ``folder`` that end in ``suffix``.

    Raises:
        DataError: the folder is missing or holds no such file.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.name.endswith(suffix) and entry.is_file())
    except OSError as error:
        reject(folder, "must be a readable folder", error.strerror or str(error))
    if not names:
        reject(folder, f"must contain *{suffix} files", "none")
    return names


def check_labels(path: Pathlike, labels: NDArray[np.int64], num_classes: int) -> None:
    """Refuse labels that are no class.

    Raises:
        DataError: a label is not below ``num_classes``, naming its row.
    """
    wrong = labels >= num_classes
    if wrong.any():
        row = int(wrong.argmax())
        reject(path, f"row {row}: the label must be below {num_classes}", int(labels[row]))
