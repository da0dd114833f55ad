"""The tests of every data set, for authors of data sets and for the library itself.

Derive from :class:`DataSuite`, say how a tiny release looks and which broken ones are refused, and pytest runs the
rest::

    class TestPoems(DataSuite):
        config = Poems.Config(max_length=20)
        refused = (("max_length", 0),)
        broken = (Broken("test.txt", b"", "must hold data"),)

        def write(self, root: Path) -> None:
            for split in ("train", "test"):
                (root / f"{split}.txt").write_text(f"a poem to {split} on")

Data that are drawn and not read, whose configuration has no ``root``, need neither ``broken`` nor ``write``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sma.errors import ConfigError, DataError, SMAError
from sma_models.training.data.base import Data, Task
from sma_models.training.data.batches import Batch, Item
from sma_models.training.data.resident import Resident
from sma_models.training.data.streams import IGNORE


@dataclass(frozen=True)
class Broken:
    """One file of a release made bad.

    Attributes:
        file: its path below the root of the release.
        content: what it holds then; None deletes it.
        rule: a pattern that the error has to match: the rule that is broken, and the value.
        named: a pattern for the place that the error names; by default the path of the file.
    """

    file: str
    content: bytes | None
    rule: str
    named: str | None = None


class DataSuite:
    """Tests of a data set on a tiny release that :meth:`write` makes."""

    config: ClassVar[Data.Config]
    """What the tiny release needs; the suite supplies ``root``."""
    refused: ClassVar[tuple[tuple[str, Any], ...]] = ()
    """Options and values that are out of range."""
    broken: ClassVar[tuple[Broken, ...]] = ()
    """Files that have to be refused."""

    def write(self, root: Path) -> None:
        """Write a tiny release, whose samples all differ, into the empty folder ``root``."""

    def opened(self, root: Path, run_seed: int = 0, **options: Any) -> Task:
        """The data in ``root``, which is written if it is not there."""
        if not root.exists():
            root.mkdir()
            self.write(root)
        return self.read(root, run_seed, **options)

    def read(self, root: Path, run_seed: int = 0, **options: Any) -> Task:
        """The data in ``root``."""
        given = {"root": str(root)} if self.has_files() else {}
        task: Task = replace(self.config, **given, **options).build().open(seed=run_seed)
        return task

    def has_files(self) -> bool:
        """Whether the data are read from a folder."""
        return any(field.name == "root" for field in fields(self.config))

    def test_splits_have_samples(self, tmp_path: Path) -> None:
        """There is something to train on and something to test on."""
        task = self.opened(tmp_path / "release")
        assert {"train", "test"} <= set(task.splits) <= {"train", "validation", "test"}
        assert all(len(samples) > 0 for _, samples in parts(task))
        assert (task.n_classes is None) == (task.kind == "lm")
        assert (task.vocab_size is None) == (task.kind == "values")

    def test_batches_have_the_shapes_of_their_kind(self, tmp_path: Path) -> None:
        """Shapes, dtypes and ranges are those that :mod:`.batches` lists."""
        task = self.opened(tmp_path / "release")
        for name, samples in parts(task):
            items = [samples[n] for n in range(min(4, len(samples)))]
            check_batch(samples.collate(items), task, len(items), name)

    def test_batches_gathered_on_a_device_are_the_same(self, tmp_path: Path) -> None:
        """``resident`` and ``collate`` give the same bits."""
        for name, samples in parts(self.opened(tmp_path / "release")):
            kept: Any = samples
            if isinstance(kept, Resident):
                numbers = list(range(min(4, len(samples))))
                gathered = kept.resident(torch.device("cpu"))(numbers)
                assert same(gathered, samples.collate([samples[n] for n in numbers])), name

    def test_reading_again_gives_the_same(self, tmp_path: Path) -> None:
        """The files and the seed decide everything, on every reading."""
        first, again = (self.opened(tmp_path / "release", 3) for _ in range(2))
        for (name, before), (_, after) in zip(parts(first), parts(again), strict=True):
            assert len(before) == len(after), name
            assert all(same(before[n], after[n]) for n in range(len(before))), name

    def test_the_seed_moves_training_windows_only(self, tmp_path: Path) -> None:
        """What is evaluated does not depend on the seed of a run."""
        first, other = (self.opened(tmp_path / "release", seed) for seed in (0, 1))
        for name, samples in first.splits.items():
            assert all(same(samples[n], other.splits[name][n]) for n in range(len(samples))), name  # type: ignore[arg-type]
        if first.endless:
            assert any(not same(first.train[n], other.train[n]) for n in range(8))

    def test_no_sample_is_in_two_splits(self, tmp_path: Path) -> None:
        """Nothing that is evaluated was trained on; the splits of a language model are disjoint bytes."""
        task = self.opened(tmp_path / "release")
        if task.text is not None:
            for name, samples in task.splits.items():
                targets = [samples[n]["targets"] for n in range(len(samples))]  # type: ignore[arg-type]
                assert bytes(torch.cat(targets).tolist()) == task.text(name)
            return
        seen: dict[bytes, str] = {}
        for name, samples in task.splits.items():
            for n in range(len(samples)):  # type: ignore[arg-type]
                assert seen.setdefault(fingerprint(samples[n]), name) == name, f"sample {n} of {name}"

    def test_reading_writes_nothing(self, tmp_path: Path) -> None:
        """The folder of a release stays as it is."""
        root = tmp_path / "release"
        task = self.opened(root)
        before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
        assert before or not self.has_files()
        assert self.opened(root).splits.keys() == task.splits.keys()
        assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before

    def test_a_release_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        """So is one without its files."""
        (tmp_path / "empty").mkdir()
        for name in ("nowhere", "empty") if self.has_files() else ():
            assert_refused(partial(self.read, tmp_path / name), DataError, name, "must")

    def test_broken_files_are_refused(self, tmp_path: Path) -> None:
        """The error names the place, the rule and the value."""
        for number, each in enumerate(self.broken):
            root = tmp_path / str(number)
            self.opened(root)
            if each.content is None:
                (root / each.file).unlink()
            else:
                (root / each.file).write_bytes(each.content)
            assert_refused(partial(self.read, root), DataError, each.named or re.escape(each.file), each.rule)

    def test_options_out_of_range_are_refused(self, tmp_path: Path) -> None:
        """The error names the option and the value."""
        root = tmp_path / "release"
        self.opened(root)
        for name, value in self.refused:
            read = partial(self.read, root, **{name: value})
            shown = re.escape(repr(value).strip("()[]"))  # a sequence may be shown as a list
            assert_refused(read, ConfigError, name, f"got .?{shown}")


def parts(task: Task) -> Iterator[tuple[str, Any]]:
    """The samples to train on and every split, by name."""
    yield "training", task.train
    yield from task.splits.items()


def check_batch(batch: Batch, task: Task, size: int, name: str) -> None:
    """Refuse a batch that is not of the kind of its task.

    Raises:
        AssertionError: naming the split and the entry.
    """
    inputs = batch["values" if task.kind == "values" else "tokens"]
    assert inputs is not None, name
    assert inputs.shape[:-1] == ((size, 2) if task.kind == "pairs" else (size,)), f"{name}: shape {inputs.shape}"
    assert inputs.dtype == (torch.float32 if task.kind == "values" else torch.int64), f"{name}: {inputs.dtype}"
    if task.vocab_size is not None:
        assert 0 <= int(inputs.min()) <= int(inputs.max()) < task.vocab_size, f"{name}: a token out of range"
    answers = batch["targets" if task.kind == "lm" else "label"]
    assert answers is not None, name
    assert answers.dtype == torch.int64, f"{name}: {answers.dtype}"
    assert answers.shape == (inputs.shape if task.kind == "lm" else (size,)), f"{name}: {answers.shape}"
    real = answers[answers != IGNORE]
    assert 0 <= int(real.min()) <= int(real.max()) < (task.n_classes or task.vocab_size or 0), f"{name}: an answer"
    valid, lengths = batch.get("valid"), batch.get("lengths")
    assert (valid is None) == (lengths is None), f"{name}: valid and lengths come together"
    if valid is not None and lengths is not None:
        assert valid.shape == inputs.shape, f"{name}: {valid.shape}"
        assert torch.equal(valid, torch.arange(inputs.shape[-1]) < lengths[..., None]), f"{name}: padding on the right"


def same(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    """Whether two samples or batches are equal bit for bit."""
    return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    return bool(left == right)


def fingerprint(item: Item) -> bytes:
    """The bytes of a sample's input."""
    given = item.get("values", item.get("tokens"))
    tensors = given if isinstance(given, tuple) else (given,)
    return b"|".join(tensor.numpy().tobytes() for tensor in tensors)


def assert_refused(do: Callable[[], Any], kind: type[SMAError], place: str, rule: str) -> None:
    """Require an error of the form ``place: rule, got value``.

    Raises:
        AssertionError: nothing is refused, or the error does not match.
    """
    try:
        do()
    except kind as error:
        message = str(error)
    else:
        raise AssertionError(f"{place}: must be refused ({rule}), got nothing of the kind")
    assert re.search(place, message), f"must name the place {place!r}, got {message!r}"
    assert re.search(rule, message), f"must name the rule {rule!r}, got {message!r}"
    assert ", got " in message, f"must name the value, got {message!r}"
