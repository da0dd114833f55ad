"""The classification tasks of the recipes, as plugins of the kind ``data``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from sma_models.training.data import image, listops, pathfinder, retrieval, speech, text
from sma_models.training.sources.base import Data, Task, cache_folder, classification, released


class Released(Data):
    """Data that come as files: from ``root`` when it is given, else downloaded into the cache."""

    release: ClassVar[str] = ""
    """Name of the release that holds the files."""

    @dataclass(kw_only=True, frozen=True)
    class Config(Data.Config):
        """``root`` is the folder in which the files lie, or the one around it; None downloads them."""

        root: str | None = None

    config: Config

    def prepare(self) -> Path:
        return released(self.release, self.config.root)


class Padded(Released):
    """Sequences of different lengths, padded in their batches."""

    @dataclass(kw_only=True, frozen=True)
    class Config(Released.Config):
        """``pad_to``: batches are as long as a multiple of it, or as the longest sample. A large one gives few shapes,
        which suits kernels and captured graphs; 1 gives the least padding.
        """

        pad_to: int = 1

        def __post_init__(self) -> None:
            self.require(self.pad_to >= 1, "pad_to", "must be at least 1")

    config: Config


class ListOps(Padded):
    """ListOps: from the files of the official release, or drawn from the published distribution."""

    release = "lra"

    @dataclass(kw_only=True, frozen=True)
    class Config(Padded.Config):
        """Without ``root``, samples are generated once, by ``seed``, and kept in the cache."""

        root: str | None = None
        max_length: int = 2000
        min_length: int = 500
        max_depth: int = 10
        max_arguments: int = 10
        train: int = 96_000
        validation: int = 2_000
        test: int = 2_000
        seed: int = 0

        def __post_init__(self) -> None:
            super().__post_init__()
            for name in ("train", "validation", "test"):
                self.require(getattr(self, name) >= 1, name, "must be at least 1")
            self.require(0 <= self.seed < 2**63, "seed", "must be at least 0 and below 2**63")

    config: Config

    def prepare(self) -> Path:
        c = self.config
        if c.root:
            return super().prepare()
        sizes = {"train": c.train, "validation": c.validation, "test": c.test}
        shape = "-".join(
            str(n) for n in (*sizes.values(), c.min_length, c.max_length, c.max_depth, c.max_arguments, c.seed)
        )
        folder = cache_folder() / f"listops-generated-{shape}"
        # The training split is written last, so a folder that has it is complete.
        if not (folder / listops.FILES["train"]).exists():
            task = listops.Task(
                max_arguments=c.max_arguments, max_depth=c.max_depth, min_length=c.min_length, max_length=c.max_length
            )
            drawn = listops.generate(sizes, seed=c.seed, task=task)
            listops.write(folder, {name: drawn[name] for name in ("test", "validation", "train")})
        return folder

    def open(self, *, seed: int) -> Task:
        return classification(listops.load(self.prepare(), self.config.max_length), self.config.pad_to)


class Image(Released):
    """CIFAR-10 in grey, pixel by pixel."""

    release = "image"

    @dataclass(kw_only=True, frozen=True)
    class Config(Released.Config):
        """``rows`` is the number of images in each file; None accepts any."""

        validation_fraction: float = 0.1
        seed: int = 0
        mean: float = 0.48
        std: float = 0.24
        rows: int | None = image.CIFAR10_ROWS

        def __post_init__(self) -> None:
            self.require(self.std > 0, "std", "must be positive")

    config: Config

    def open(self, *, seed: int) -> Task:
        c = self.config
        return classification(
            image.load_cifar10(
                self.prepare(),
                validation_fraction=c.validation_fraction,
                seed=c.seed,
                mean=c.mean,
                std=c.std,
                rows=c.rows,
            )
        )


class Idx(Released):
    """Images in the idx files of MNIST, pixel by pixel."""

    release = "mnist"

    @dataclass(kw_only=True, frozen=True)
    class Config(Released.Config):
        validation_fraction: float = 0.1
        seed: int = 0
        mean: float = 0.1307
        std: float = 0.3081
        num_classes: int = 10

        def __post_init__(self) -> None:
            self.require(self.std > 0, "std", "must be positive")

    config: Config

    def open(self, *, seed: int) -> Task:
        c = self.config
        return classification(
            image.load_idx(
                self.prepare(),
                validation_fraction=c.validation_fraction,
                seed=c.seed,
                mean=c.mean,
                std=c.std,
                num_classes=c.num_classes,
            )
        )


class Text(Padded):
    """Sentiment of film reviews, byte by byte (aclImdb)."""

    release = "text"

    @dataclass(kw_only=True, frozen=True)
    class Config(Padded.Config):
        max_length: int = 4000
        validation_fraction: float = 0.1
        seed: int = 0

    config: Config

    def open(self, *, seed: int) -> Task:
        c = self.config
        root = self.prepare()
        return classification(
            text.load(root, max_length=c.max_length, validation_fraction=c.validation_fraction, seed=c.seed), c.pad_to
        )


class Retrieval(Padded):
    """Pairs of papers, byte by byte (ACL Anthology)."""

    release = "lra"

    @dataclass(kw_only=True, frozen=True)
    class Config(Padded.Config):
        max_length: int = 4000

    config: Config

    def open(self, *, seed: int) -> Task:
        return classification(retrieval.load(self.prepare(), self.config.max_length), self.config.pad_to)


class Pathfinder(Released):
    """Are two dots joined? ``resolution`` 32 is Pathfinder, 128 is Path-X."""

    release = "lra"

    @dataclass(kw_only=True, frozen=True)
    class Config(Released.Config):
        resolution: int = 32
        difficulty: str = "curv_contour_length_14"
        fractions: tuple[float, float] = (0.1, 0.1)
        seed: int = 0
        mean: float = 0.5
        std: float = 0.5

        def __post_init__(self) -> None:
            self.require(self.std > 0, "std", "must be positive")

    config: Config

    def open(self, *, seed: int) -> Task:
        c = self.config
        return classification(
            pathfinder.load(
                self.prepare(),
                resolution=c.resolution,
                difficulty=c.difficulty,
                fractions=c.fractions,
                seed=c.seed,
                mean=c.mean,
                std=c.std,
            )
        )


class Speech(Released):
    """Spoken words, sample by sample (Speech Commands)."""

    release = "speech"

    @dataclass(kw_only=True, frozen=True)
    class Config(Released.Config):
        """``classes`` are the words to tell apart; None means all that have a folder."""

        classes: tuple[str, ...] | None = speech.SC10_CLASSES
        length: int = speech.RATE
        check: bool = True

    config: Config

    def open(self, *, seed: int) -> Task:
        c = self.config
        return classification(speech.load(self.prepare(), classes=c.classes, length=c.length, check=c.check))
