"""Spoken words as raw samples, in the layout of Speech Commands (Warden 2018).

``root/<class>/*.wav`` (16 kHz, 16 bit, mono), ``root/validation_list.txt`` and ``root/testing_list.txt`` with a line
``<class>/<file>.wav`` each; what neither lists is for training. Folders that begin with ``_`` are no classes.
"""

from __future__ import annotations

import os
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sma.errors import ConfigError
from sma_models.training.data.base import ReleasedData, Task, classification
from sma_models.training.data.batches import Item
from sma_models.training.data.labelled import Splits, ValueDataset
from sma_models.training.data.reading import Pathlike, find_folder, list_files, read_lines, reject
from sma_models.training.data.release import Release, Resource

RELEASE = Release(
    name="speech",
    folder="speech_commands_v0.02",
    resources=(
        Resource(
            url="https://storage.googleapis.com/download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
            known_hash="sha256:af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
            unpack="tar",
        ),
    ),
    licence="CC BY 4.0",
)
RATE = 16_000
"""Samples in a second."""
SC10_CLASSES = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
"""The ten command words that the ten-class task takes out of the thirty-five."""
PLACES = (".", "speech_commands", "speech_commands_v0.02", "SpeechCommands/speech_commands_v0.02")
LISTS = {"validation": "validation_list.txt", "test": "testing_list.txt"}


def read_wav(path: Pathlike, header_only: bool = False) -> NDArray[np.int16]:
    """The samples (T,) of a file, or with ``header_only`` none of them, after the same checks.

    Raises:
        DataError: missing, not a WAV file, not 16 kHz / 16 bit / mono / uncompressed, without samples, or shorter than
            its header states.
    """
    try:
        with open(path, "rb") as raw, wave.open(raw, "rb") as file:
            count = _check_header(path, file, os.fstat(raw.fileno()).st_size)
            content = b"" if header_only else file.readframes(count)
    except OSError as error:
        reject(path, "must be a readable file", error.strerror or str(error))
    except (wave.Error, EOFError) as error:
        reject(path, "must be an uncompressed WAV file", str(error) or "a file that ends too early")
    if not header_only and len(content) != 2 * count:
        reject(path, f"must hold the {count} samples that its header states", f"{len(content) // 2} samples")
    return np.frombuffer(content, dtype="<i2")


def _check_header(path: Pathlike, file: wave.Wave_read, size: int) -> int:
    found = (file.getframerate(), 8 * file.getsampwidth(), file.getnchannels())
    if found != (RATE, 16, 1):
        reject(path, f"must have {RATE} Hz, 16 bit, 1 channel", "{} Hz, {} bit, {} channel(s)".format(*found))
    count = file.getnframes()
    if not count:
        reject(path, "must hold samples", "none")
    if size < 44 + 2 * count:  # 44 bytes is the least that can stand before the samples
        reject(path, f"must hold the {count} samples that its header states", f"a file of {size} bytes")
    return count


def fit(samples: NDArray[np.int16], length: int) -> NDArray[np.int16]:
    """Cut to ``length`` samples, or fill up with silence at the end."""
    return np.pad(samples[:length], (0, max(0, length - len(samples))))


class Recordings(ValueDataset):
    """Recordings read one by one on access: ``values (length,)`` float32 in [-1, 1).

    Args:
        root: the folder of the class folders.
        files: (N,) ``<class>/<file>.wav``.
        labels: (N,) their classes.
        num_classes: how many classes there are.
        length: every recording is cut or filled up with silence to this number of samples.
    """

    def __init__(
        self, root: Pathlike, files: Sequence[str], labels: Sequence[int], num_classes: int, length: int
    ) -> None:
        super().__init__(labels, num_classes)
        self.root = Path(root)
        self.files = np.array(files)
        self.length = length

    def sample(self, stored: int) -> Item:
        samples = fit(read_wav(self.root / str(self.files[stored])), self.length)
        return {"values": torch.from_numpy(samples.astype(np.float32) / 32768.0)}


def load(
    root: Pathlike, *, classes: Sequence[str] | None = None, length: int = RATE, check: bool = True
) -> Splits[Recordings]:
    """The whole task from ``root`` (the folder of the class folders, or the one around it).

    Args:
        root: where the data lie.
        classes: the class folders to use; None means all of them.
        length: samples in each recording.
        check: read the header of every file now, so that no run stops hours later at a broken one.

    Raises:
        ConfigError: the length is below 1 or a class is named twice.
        DataError: a folder or list is missing, a split is empty, a listed file does not exist or is listed twice, or a
            file is broken (see :func:`read_wav`).
    """
    if length < 1:
        raise ConfigError(f"length: must be at least 1, got {length!r}")
    folder = find_folder(root, PLACES, LISTS["validation"])
    names = _class_names(folder, classes)
    split_of = _read_lists(folder)
    files: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    found: set[str] = set()
    for name in names:
        for file in list_files(folder / name, ".wav"):
            entry = f"{name}/{file}"
            found.add(entry)
            files[split_of.get(entry, "train")].append(entry)
            if check:
                read_wav(folder / name / file, header_only=True)
    for entry, split in split_of.items():
        if entry not in found and (classes is None or entry.partition("/")[0] in names):
            reject(folder / LISTS[split], "must list files that exist", entry)
    for split, entries in files.items():
        if not entries:
            reject(folder, f"the {split} split must have recordings", "none")
    label = {name: number for number, name in enumerate(names)}
    parts = {
        split: Recordings(folder, entries, [label[entry.partition("/")[0]] for entry in entries], len(names), length)
        for split, entries in files.items()
    }
    return Splits(
        train=parts["train"], validation=parts["validation"], test=parts["test"], max_length=length, classes=names
    )


def _class_names(folder: Path, classes: Sequence[str] | None) -> tuple[str, ...]:
    there = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] not in "_."))
    if not there:
        reject(folder, "must contain a folder for each class", "none")
    if classes is None:
        return there
    if len(set(classes)) != len(classes) or not classes:
        raise ConfigError(f"classes: must name each class once, got {list(classes)!r}")
    missing = ", ".join(name for name in classes if name not in there)
    if missing:
        reject(
            folder, f"must contain a folder for each of classes (null takes all: {', '.join(there)})", f"no {missing}"
        )
    return tuple(classes)


def _read_lists(folder: Path) -> dict[str, str]:
    split_of: dict[str, str] = {}
    for split, name in LISTS.items():
        for number, line in read_lines(folder / name):
            entry = line.decode("utf-8", "replace").strip().replace("\\", "/")
            if entry.count("/") != 1 or not entry.endswith(".wav"):
                reject(folder / name, f"line {number}: must be <class>/<file>.wav", entry)
            if entry in split_of:
                reject(folder / name, f"line {number}: a file must be listed once", entry)
            split_of[entry] = split
    return split_of


class SpeechData(ReleasedData):
    """Spoken words, sample by sample (Speech Commands)."""

    release = RELEASE

    @dataclass(kw_only=True, frozen=True)
    class Config(ReleasedData.Config):
        """``classes`` are the words to tell apart; None means all that have a folder."""

        classes: tuple[str, ...] | None = SC10_CLASSES
        length: int = RATE
        check: bool = True

    config: Config

    def open(self, *, seed: int) -> Task:
        c = self.config
        return classification(load(self.prepare(), classes=c.classes, length=c.length, check=c.check))
