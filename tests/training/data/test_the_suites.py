"""Every registered data set has a suite, and the suite finds data sets that break its rules."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import tests.training.data
from sma.errors import DataError
from sma.plugins import registry
from sma_models.training.data.base import Data, Task, classification
from sma_models.training.data.labelled import Ragged, Splits, TokenDataset
from sma_models.training.data.reading import find_folder, read_lines
from sma_models.training.data.testing import Broken, DataSuite


def suites(base: type[DataSuite] = DataSuite) -> Iterator[type[DataSuite]]:
    for suite in base.__subclasses__():
        yield suite
        yield from suites(suite)


def test_every_data_set_has_a_suite() -> None:
    for module in pkgutil.iter_modules(tests.training.data.__path__):
        importlib.import_module(f"tests.training.data.{module.name}")
    covered = {suite.config.owner for suite in suites() if hasattr(suite, "config")}
    sets = [entry for entry in registry().entries() if entry.kind == "data"]
    assert sets
    missing = [f"{entry.name} ({entry.provider})" for entry in sets if entry.target not in covered]
    assert not missing, f"no suite in tests/training/data covers {', '.join(missing)}"


class Poems(Data):
    """Lines of text, one file for each split; the class is whether a line is long."""

    @dataclass(kw_only=True, frozen=True)
    class Config(Data.Config):
        root: str | None = None
        max_length: int = 20

        def __post_init__(self) -> None:
            self.require(self.max_length >= 1, "max_length", "must be at least 1")

    config: Config

    def rows(self, split: str, seed: int) -> list[bytes]:
        folder = find_folder(self.config.root or ".", (".",), "train.txt")
        return [line[: self.config.max_length] for _, line in read_lines(folder / f"{split}.txt")]

    def samples(self, split: str, seed: int) -> TokenDataset:
        rows = self.rows(split, seed)
        return TokenDataset(Ragged.join(rows), [len(row) % 2 for row in rows], 2, 256)

    def open(self, *, seed: int) -> Task:
        train, test = (self.samples(split, seed) for split in ("train", "test"))
        return classification(Splits(train=train, validation=None, test=test, max_length=20, classes=("even", "odd")))


class SharesALine(Poems):
    def rows(self, split: str, seed: int) -> list[bytes]:
        return [*super().rows(split, seed), b"the same in both"]


class Restless(Poems):
    calls = 0

    def rows(self, split: str, seed: int) -> list[bytes]:
        Restless.calls += 1
        return [*super().rows(split, seed), str(Restless.calls).encode()]


class FollowsTheSeed(Poems):
    def rows(self, split: str, seed: int) -> list[bytes]:
        return [*super().rows(split, seed), str(seed).encode()]


class LeavesATrace(Poems):
    def rows(self, split: str, seed: int) -> list[bytes]:
        (Path(self.config.root or ".") / "cache").touch()
        return super().rows(split, seed)


class HasNoTest(Poems):
    def open(self, *, seed: int) -> Task:
        task = super().open(seed=seed)
        return Task("tokens", task.train, {"train": task.train}, vocab_size=257, n_classes=2)


class CountsTooFewClasses(Poems):
    def open(self, *, seed: int) -> Task:
        task = super().open(seed=seed)
        return Task("tokens", task.train, task.splits, vocab_size=257, n_classes=1)


class SaysLittle(Poems):
    def rows(self, split: str, seed: int) -> list[bytes]:
        found = super().rows(split, seed)
        if len(found) < 3:
            raise DataError("too short")
        return found


class Sound(DataSuite):
    config = Poems.Config()
    refused = (("max_length", 0),)
    broken = (Broken("test.txt", b"", "must hold data, got an empty file"),)

    def write(self, root: Path) -> None:
        for split in ("train", "test"):
            (root / f"{split}.txt").write_text("".join(f"{split} {'o' * n}\n" for n in range(5)))


class SoundWithShortFiles(Sound):
    broken = (Broken("test.txt", b"one\ntwo\n", "must hold", named="test.txt"),)


@pytest.mark.parametrize(
    ("plugin", "test"),
    [
        (SharesALine, "test_no_sample_is_in_two_splits"),
        (Restless, "test_reading_again_gives_the_same"),
        (FollowsTheSeed, "test_the_seed_moves_training_windows_only"),
        (LeavesATrace, "test_reading_writes_nothing"),
        (HasNoTest, "test_splits_have_samples"),
        (CountsTooFewClasses, "test_batches_have_the_shapes_of_their_kind"),
        (SaysLittle, "test_broken_files_are_refused"),
    ],
)
def test_a_broken_data_set_is_found(plugin: type[Poems], test: str, tmp_path: Path) -> None:
    base = SoundWithShortFiles if plugin is SaysLittle else Sound
    suite = type("Unsound", (base,), {"config": plugin.Config()})
    if base is Sound:
        (tmp_path / "sound").mkdir()
        getattr(Sound(), test)(tmp_path / "sound")
    (tmp_path / "unsound").mkdir()
    with pytest.raises(AssertionError):
        getattr(suite(), test)(tmp_path / "unsound")
