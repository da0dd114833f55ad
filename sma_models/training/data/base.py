"""The kind ``data``: a data set that recipes can name, and what it hands to training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sma.configurable import BaseConfig
from sma.errors import ConfigError, MissingExtraError
from sma.interfaces import Plugin
from sma_models.training.data.batches import Collating, Kind
from sma_models.training.data.labelled import LabelledDataset, PaddedDataset, Splits
from sma_models.training.data.reading import named_place, reject
from sma_models.training.data.release import Release, cache_folder


@dataclass(frozen=True)
class Task:
    """Opened data: the samples for training and evaluation.

    Attributes:
        kind: what a batch holds (see :mod:`sma_models.training.data.batches`).
        train: samples to learn from.
        splits: what to evaluate on, by the name of the split; one that does not exist is missing.
        endless: True when ``train`` has a sample for every number.
        vocab_size: number of tokens; None when the input is real numbers.
        n_classes: number of classes; None for a language model.
        lanes: ``lanes(split, batch_size)`` gives batches that go on where the batch before stopped, for a language
            model that carries its state through an evaluation; None where every sample stands for itself.
        text: ``text(split)`` gives the bytes of a split of a language model.
        notes: what the user should know about the files, a line each: how many were passed over, and why.
    """

    kind: Kind
    train: Collating
    splits: dict[str, Collating]
    endless: bool = False
    vocab_size: int | None = None
    n_classes: int | None = None
    lanes: Callable[[str, int], Any] | None = None
    text: Callable[[str], bytes] | None = None
    notes: tuple[str, ...] = ()

    def split(self, name: str) -> Collating:
        """The samples of a split.

        Raises:
            ConfigError: there is no such split.
        """
        if name not in self.splits:
            raise ConfigError(f"split: must be one of {', '.join(self.splits)}, got {name!r}")
        return self.splits[name]


class Data(Plugin):
    """A data set that recipes can name. Nothing is read before :meth:`open`."""

    kind: ClassVar[str] = "data"

    @dataclass(kw_only=True, frozen=True)
    class Config(BaseConfig):
        pass

    def __init__(self, config: Config) -> None:
        self.config = config

    def prepare(self) -> Path | None:
        """Make the data available: find them, download and check them, or generate them. Files that are there already
        stay.

        Returns:
            The folder in which they lie, or None when there is none.

        Raises:
            DataError: it cannot be done.
        """
        return None

    @abstractmethod
    def open(self, *, seed: int) -> Task:
        """Prepare the data if need be, and read them.

        Args:
            seed: of the training run; decides where a language model's windows lie.

        Raises:
            DataError: files are missing or broken.
        """


class ReleasedData(Data):
    """Data that come as files: from ``root`` when it is given, else downloaded into the cache."""

    release: ClassVar[Release]
    """The files to download."""

    @dataclass(kw_only=True, frozen=True)
    class Config(Data.Config):
        """``root`` is the folder in which the files lie, or the one around it; None downloads them."""

        root: str | None = None

    config: Config

    def prepare(self) -> Path:
        return locate(self.release, self.config.root)


class PaddedData(ReleasedData):
    """Sequences of different lengths, padded in their batches."""

    @dataclass(kw_only=True, frozen=True)
    class Config(ReleasedData.Config):
        """``pad_to``: batches are as long as a multiple of it, or as the longest sample. A large one gives few shapes,
        which suits kernels and captured graphs; 1 gives the least padding.
        """

        pad_to: int = 1

        def __post_init__(self) -> None:
            self.require(self.pad_to >= 1, "pad_to", "must be at least 1")

    config: Config


def classification(splits: Splits[Any], pad_to: int = 1) -> Task:
    """The task of classifying the samples of ``splits``.

    Args:
        splits: the samples.
        pad_to: of sequences of different lengths: batches are as long as a multiple of it, or as the longest sample.
    """
    parts: dict[str, LabelledDataset | None] = {
        "train": splits.train,
        "validation": splits.validation,
        "test": splits.test,
    }
    there: dict[str, Collating] = {
        name: part.padded_to(pad_to) if isinstance(part, PaddedDataset) else part
        for name, part in parts.items()
        if part is not None
    }
    first: LabelledDataset = splits.train
    return Task(first.kind, there["train"], there, vocab_size=first.vocab_size, n_classes=first.num_classes)


def locate(release: Release, root: str | None = None) -> Path:
    """The folder of a release: ``root``, without touching the network, or the one downloaded into the cache.

    Raises:
        ConfigError: ``root`` is the empty string.
        DataError: there is no ``root``, or the download fails.
        MissingExtraError: a download is needed, and the extra ``train`` is not installed.
    """
    if root is not None:
        if not root:
            raise ConfigError(f"root: must be the folder of the {release.name} data, or null to download them, got ''")
        place = named_place(root)
        if not place.exists():
            reject(place, f"must be the folder of the {release.name} data", "nothing there")
        return place
    try:
        from sma_models.training.data.download import fetch
    except ImportError as error:
        raise MissingExtraError(
            "downloads need pooch, from the extra 'train': pip install 'sparse-modular-activation[train]'"
        ) from error
    return fetch(release, cache_folder())
