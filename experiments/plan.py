"""The plan: experiments with tasks and variants, and the queue that orders their runs."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sma.errors import ConfigError

ROOT = Path(__file__).parent
"""The folder of the experiments, with their queue."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ENTRY = ("experiment", "task", "variants", "seeds")


@dataclass(frozen=True)
class Entry:
    """One run: a variant of an experiment on a task, with a seed.

    Attributes:
        recipe: name or file of the recipe that is trained.
        overrides: changes to it, those of the task before those of the variant.
        steps: optimiser steps in all.
    """

    experiment: str
    task: str
    variant: str
    seed: int
    recipe: str
    overrides: tuple[str, ...]
    steps: int

    @property
    def key(self) -> str:
        """The name of the run, the only one of this name."""
        return f"{self.experiment}.{self.task}.{self.variant}.s{self.seed}"

    @property
    def arguments(self) -> list[str]:
        """The recipe with all its changes, as ``sma train`` takes it."""
        return [self.recipe, *self.overrides, f"train.steps={self.steps}", f"train.seed={self.seed}"]

    @property
    def data(self) -> tuple[str, ...]:
        """What the data depend on."""
        return (self.recipe, *(each for each in self.overrides if each.startswith("data.")))

    def definition(self) -> dict[str, Any]:
        """The definition of the run: results of one definition are comparable."""
        return {"recipe": self.recipe, "overrides": list(self.overrides), "steps_in_all": self.steps}


@dataclass(frozen=True)
class Task:
    """What every variant is trained on."""

    recipe: str
    steps: int
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Experiment:
    """A question: tasks, and variants that are compared on each."""

    name: str
    folder: Path
    tasks: dict[str, Task]
    variants: dict[str, tuple[str, ...]]

    def entry(self, task: str, variant: str, seed: int) -> Entry:
        """The run of a variant on a task."""
        chosen = self.tasks[task]
        overrides = (*chosen.overrides, *self.variants[variant])
        return Entry(self.name, task, variant, seed, chosen.recipe, overrides, chosen.steps)


def read_experiment(name: str, root: Path = ROOT) -> Experiment:
    """Read ``<root>/<name>/experiment.yaml``.

    Raises:
        ConfigError: there is none, or it is not valid.
    """
    path = root / name / "experiment.yaml"
    content = _mapping(_load(path), f"{path}", ("question", "tasks", "variants"))
    tasks = {
        _name(f"{path}: tasks", task): _task(f"{path}: tasks.{task}", each)
        for task, each in _filled(content.get("tasks"), f"{path}: tasks").items()
    }
    variants = {
        _name(f"{path}: variants", variant): _texts(f"{path}: variants.{variant}", each)
        for variant, each in _filled(content.get("variants"), f"{path}: variants").items()
    }
    return Experiment(name, root / name, tasks, variants)


def _task(place: str, content: Any) -> Task:
    given = _mapping(content, place, ("recipe", "steps", "overrides"))
    recipe, steps = given.get("recipe"), given.get("steps")
    if not isinstance(recipe, str):
        raise ConfigError(f"{place}.recipe: must be the name or the file of a recipe, got {recipe!r}")
    if type(steps) is not int or steps < 1:
        raise ConfigError(f"{place}.steps: must be a number of at least 1, got {steps!r}")
    return Task(recipe, steps, _texts(f"{place}.overrides", given.get("overrides", [])))


def read_queue(root: Path = ROOT) -> list[Entry]:
    """The runs of ``<root>/queue.yaml`` in their order.

    Raises:
        ConfigError: an entry is not valid, or names something that does not exist; the message says which one.
    """
    path = root / "queue.yaml"
    content = _load(path)
    if not isinstance(content, list):
        raise ConfigError(f"{path}: must be a list of runs, got {content!r}")
    known = experiment_names(root)
    experiments = {name: read_experiment(name, root) for name in known}
    entries: dict[str, Entry] = {}
    for number, each in enumerate(content):
        for entry in _expand(f"{path}: [{number}]", each, experiments):
            if entry.key in entries:
                raise ConfigError(f"{path}: [{number}]: every run must be named once, got {entry.key} again")
            entries[entry.key] = entry
    return list(entries.values())


def experiment_names(root: Path = ROOT) -> list[str]:
    """The names of the experiments."""
    return sorted(path.parent.name for path in root.glob("*/experiment.yaml"))


def _expand(place: str, content: Any, experiments: Mapping[str, Experiment]) -> list[Entry]:
    """The runs that one entry of the queue stands for: every variant with the first seed, then with the next."""
    given = _mapping(content, place, _ENTRY)
    experiment = experiments[_known(f"{place}.experiment", given.get("experiment"), experiments)]
    task = _known(f"{place}.task", given.get("task"), experiment.tasks)
    variants = given.get("variants", list(experiment.variants))
    seeds = given.get("seeds")
    if not isinstance(variants, list):
        raise ConfigError(f"{place}.variants: must be a list of names, got {variants!r}")
    if not isinstance(seeds, list) or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ConfigError(f"{place}.seeds: must be a list of numbers of at least 0, got {seeds!r}")
    names = [_known(f"{place}.variants[{n}]", variant, experiment.variants) for n, variant in enumerate(variants)]
    return [experiment.entry(task, variant, seed) for seed in seeds for variant in names]


def _load(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: must be there, got no such file") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: must be YAML, got {' '.join(str(error).split())}") from error


def _mapping(content: Any, place: str, keys: Iterable[str]) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ConfigError(f"{place}: must be a mapping, got {content!r}")
    for key in content:
        _known(f"{place}: a key", key, list(keys))
    return content


def _filled(content: Any, place: str) -> dict[str, Any]:
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{place}: must be a mapping that is not empty, got {content!r}")
    return content


def _name(place: str, name: Any) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"{place}: a name must be letters, digits, '.', '_' and '-', got {name!r}")
    return name


def _texts(place: str, content: Any) -> tuple[str, ...]:
    if not isinstance(content, list) or not all(isinstance(each, str) for each in content):
        raise ConfigError(f"{place}: must be a list of key=value, got {content!r}")
    return tuple(content)


def _known(place: str, name: Any, known: Iterable[str]) -> str:
    names = list(known)
    if name not in names:
        close = difflib.get_close_matches(str(name), names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"{place}: must be one of {', '.join(names)}, got {name!r}{hint}")
    return str(name)
