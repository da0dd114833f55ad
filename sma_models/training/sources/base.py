"""The kind ``data``, and what it hands to training."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from sma.configurable import BaseConfig
from sma.errors import ConfigError, MissingExtraError
from sma.interfaces import Plugin
from sma_models.training.data.batching import Collating
from sma_models.training.data.datasets import Kind, LabelledDataset, PaddedDataset, Splits


@dataclass(frozen=True)
class Task:
    """Opened data: what a model is trained and judged on.

    Attributes:
        kind: what a batch holds (see :mod:`sma_models.training.data.datasets`).
        train: samples to learn from.
        splits: what to evaluate on, by the name of the split; one that does not exist is missing.
        endless: True when ``train`` has a sample for every number.
        vocab_size: number of tokens; None when the input is real numbers.
        n_classes: number of classes; None for a language model.
        lanes: ``lanes(split, batch_size)`` gives batches that go on where the batch before stopped, for a language
            model that carries its
            state through an evaluation; None where every sample stands for itself.
        text: ``text(split)`` gives the bytes of a split of a language model.
    """

    kind: Kind
    train: Collating
    splits: dict[str, Collating]
    endless: bool = False
    vocab_size: int | None = None
    n_classes: int | None = None
    lanes: Callable[[str, int], Any] | None = None
    text: Callable[[str], bytes] | None = None

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
        """Make the data available: find them, download and check them, or generate them. What is there already stays.

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


def cache_folder() -> Path:
    """Where downloads are kept: ``$SMA_CACHE``, else a folder in the user's cache."""
    chosen = os.environ.get("SMA_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sma"


def released(name: str, root: str | None) -> Path:
    """The folder of a published data set: ``root`` when it is given, else what was or is now downloaded into the cache.

    Raises:
        DataError: the folder is missing, or the download fails.
        MissingExtraError: a download is needed, and the extra ``train`` is not installed.
    """
    try:
        from sma_models.training.data.download import locate
    except ImportError as error:
        raise MissingExtraError(
            "downloads need pooch, from the extra 'train': pip install 'sparse-modular-activation[train]'"
        ) from error
    return locate(name, root=Path(root).expanduser() if root else None, cache=cache_folder())
