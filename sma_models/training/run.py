"""The folder of a training run. Its files are never overwritten by another run.

``config.yaml`` (the recipe, every value written out), ``metrics.csv``, ``tensorboard/``,
``checkpoints/last.safetensors`` (to go on from),
``model.safetensors`` (the final weights and their spec), ``summary.json`` (the results; written last, so a run that
has it is finished).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sma.errors import CheckpointError, ConfigError, SpecError
from sma.interfaces import Model
from sma.spec import load_as
from sma.weights import load
from sma_models.training.checkpoint import read_checkpoint
from sma_models.training.recipe import Recipe, recipe_yaml

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Run:
    """One training run in a folder of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.csv"
        self.checkpoint = path / "checkpoints" / "last.safetensors"
        self.weights = path / "model.safetensors"
        self.summary = path / "summary.json"
        self.figures = path / "figures"

    @classmethod
    def create(cls, runs: Path, recipe_name: str, recipe: Recipe, name: str | None = None) -> Run:
        """Make the folder ``runs/<recipe>/<name or time>``; it appears with its configuration in it.

        Raises:
            ConfigError: the name is no plain name, or there is such a run already.
        """
        parent = runs / recipe_name
        check_name(parent, name)
        parent.mkdir(parents=True, exist_ok=True)
        fresh = parent / f".new-{os.getpid()}-{time.time_ns()}"
        fresh.mkdir()
        (fresh / "config.yaml").write_text(recipe_yaml(recipe), encoding="utf-8")
        try:
            return cls(_claim(fresh, parent, name))
        except BaseException:
            (fresh / "config.yaml").unlink()
            fresh.rmdir()
            raise

    @property
    def name(self) -> str:
        """``<recipe>/<name>``."""
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def finished(self) -> bool:
        """True once the results are written."""
        return self.summary.is_file()

    def recipe(self, *overrides: str) -> Recipe:
        """The recipe of the run.

        Raises:
            SpecError: ``config.yaml`` is not valid.
        """
        return load_as(self.config, Recipe, *overrides)

    def model(self) -> Model:
        """The trained model in evaluation mode; of an unfinished run, as it was at the last checkpoint.

        Raises:
            CheckpointError: there are none yet, or the file is broken.
        """
        if self.weights.is_file():
            return load(self.weights)
        if not self.checkpoint.is_file():
            raise CheckpointError(f"{self.path}: has no weights yet; go on with: sma train --resume {self.path}")
        model: Model = self.recipe().model.build()
        read_checkpoint(self.checkpoint).restore_model(model)
        return model.eval()

    def read_summary(self) -> dict[str, Any]:
        """The results; an empty mapping for an unfinished run.

        Raises:
            CheckpointError: the file is broken.
        """
        if not self.finished:
            return {}
        try:
            content = json.loads(self.summary.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{self.summary}: must be JSON, got {error}") from error
        assert isinstance(content, dict)
        return content

    def write_summary(self, content: dict[str, Any]) -> None:
        """Write the results, complete or not at all."""
        write_text(self.summary, json.dumps(content, indent=2) + "\n")

    def remove_unfinished(self) -> None:
        """Remove what a process that was killed was writing; only while the run is locked."""
        for folder in (self.path, self.checkpoint.parent):
            for pattern in (".*.tmp", ".tmp*"):  # ours, and those of safetensors within
                for file in folder.glob(pattern):
                    file.unlink()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training in this folder; the lock goes with the process, however that ends.

        Raises:
            ConfigError: another process trains here.
        """
        import fcntl

        with open(self.path / ".lock", "w", encoding="ascii") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"{self.path}: must not be in use, got a run that another process is training"
                ) from error
            yield


def _claim(fresh: Path, parent: Path, name: str | None) -> Path:
    """Move the new folder to its name.

    A rename onto a folder that holds something fails, so two runs never share one.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1, 1000):
        target = parent / (name or (stamp if attempt == 1 else f"{stamp}-{attempt}"))
        try:
            return fresh.rename(target)
        except OSError:
            if not target.exists():
                raise
            if name is not None:
                check_name(parent, name)
    raise ConfigError(f"{parent}: must hold fewer than 999 runs that started at {stamp}, got 999; give the run a name")


def check_name(parent: Path, name: str | None) -> None:
    """Refuse a name that is no plain name, or that a run in ``parent`` has.

    Raises:
        ConfigError: it is one of these.
    """
    if name is not None and not _NAME.fullmatch(name):
        raise ConfigError(f"name: must be letters, digits, '.', '_' and '-', got {name!r}")
    if name is not None and (parent / name).exists():
        raise ConfigError(f"name: must be new, got {name!r}; go on with that run by --resume {parent / name}")


def find_run(text: str, runs: Path) -> Run:
    """The run that a user means: a path, ``<recipe>/<name>`` below ``runs``, or ``<recipe>`` for the latest one of it.

    Raises:
        ConfigError: there is none.
    """
    places = [Path(text), runs / text]
    for place in places:
        if (place / "config.yaml").is_file():
            return Run(place)
    for place in places:
        if place.is_dir():
            found = [path.parent for path in place.glob("*/config.yaml") if not path.parent.name.startswith(".")]
            if found:
                return Run(max(found, key=lambda path: (path / "config.yaml").stat().st_mtime_ns))
    looked_at = ", ".join(str(place) for place in places)
    raise ConfigError(f"run: must be the folder of a training run, got {text!r} (looked at {looked_at})")


def write_text(path: Path, text: str) -> None:
    """Write a file, complete or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def check_same(run: Run, recipe: str | None) -> None:
    """Refuse to continue a run as one of another recipe.

    Raises:
        SpecError: the names differ.
    """
    if recipe is not None and recipe != run.path.parent.name:
        raise SpecError(
            f"recipe: must be {run.path.parent.name!r}, that of the run {run.path}, got {recipe!r}; it may be left out"
        )
