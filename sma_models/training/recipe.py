"""Recipes: a model, data, an optimiser and a training plan in one YAML file, read by the machinery of specs."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Literal

import torch

from sma.configurable import BaseConfig
from sma.errors import ConfigError, SpecError
from sma.interfaces import Model
from sma.spec import load_as, to_yaml
from sma_models.training.data.base import Data
from sma_models.training.data.batching import Source

SUFFIXES = (".yaml", ".yml")


@dataclass(kw_only=True, frozen=True)
class OptimiserConfig(BaseConfig):
    """The optimiser and its learning rate over the steps.

    Attributes:
        algorithm: ``adamw`` and ``radam`` shrink the weights by ``lr * weight_decay``, apart from the gradient;
            ``adam`` adds the decay to
            the gradient.
        lr: peak learning rate.
        betas: decay of the two moments.
        eps: added to the denominator.
        weight_decay: on every parameter.
        clip: largest norm of the gradient; None leaves it as it is.
        warmup: steps of linear increase to the peak.
        power: of the decay to 0 over the remaining steps: 1 is linear, 2 quadratic, 0 keeps the peak.
    """

    algorithm: Literal["adamw", "radam", "adam"] = "adamw"
    lr: float = 0.004
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float | None = 1.0
    warmup: int = 0
    power: float = 1.0

    def __post_init__(self) -> None:
        self.require(self.lr > 0, "lr", "must be positive")
        self.require(all(0 <= beta < 1 for beta in self.betas), "betas", "must lie in [0, 1)")
        self.require(self.eps > 0, "eps", "must be positive")
        self.require(self.weight_decay >= 0, "weight_decay", "must not be negative")
        self.require(self.clip is None or self.clip > 0, "clip", "must be positive, or null for no clipping")
        self.require(self.warmup >= 0, "warmup", "must not be negative")
        self.require(self.power >= 0, "power", "must not be negative")


@dataclass(kw_only=True, frozen=True)
class TrainConfig(BaseConfig):
    """How long to train, on what, and what to log.

    Attributes:
        steps: optimiser steps in all.
        batch_size: samples in one step.
        accumulate: number of equal parts in which a step's batch goes through the model, to save memory.
        eval_batch_size: samples in a batch of an evaluation; None means ``batch_size / accumulate``.
        eval_every: steps between evaluations on the validation split; 0 means only after the last step.
        eval_batches: at most so many batches in these; None means the whole split. Final results are always of the
            whole split.
        checkpoint_every: steps between checkpoints.
        log_every: steps between lines of ``metrics.csv``.
        precision: of the arithmetic; with ``bfloat16`` the weights stay in float32 (mixed precision).
        seed: of the weights, the order of the samples and dropout.
        resident: keep the samples on the device and put the batches together there, which takes no time of the
            processor; null means on an accelerator, where the data set can and has at most 1 GiB. The batches are the
            same.
        workers: processes that read data in advance, where the samples are not kept on the device; the batches are
            the same for every number.
        device: where to compute; ``auto`` takes an accelerator when there is one.
        capture: run the steps as CUDA graphs, see :class:`~sma_models.training.captured.CapturedSteps`; null means
            on a CUDA device, where the model allows it.
    """

    steps: int
    batch_size: int
    accumulate: int = 1
    eval_batch_size: int | None = None
    eval_every: int = 1000
    eval_batches: int | None = None
    checkpoint_every: int = 1000
    log_every: int = 10
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    seed: int = 0
    resident: bool | None = None
    workers: int = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    capture: bool | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "checkpoint_every", "log_every"):
            self.require(getattr(self, name) >= 1, name, "must be at least 1")
        for name in ("eval_batch_size", "eval_batches"):
            self.require(getattr(self, name) is None or getattr(self, name) >= 1, name, "must be at least 1, or null")
        for name in ("eval_every", "workers", "seed"):
            self.require(getattr(self, name) >= 0, name, "must not be negative")
        self.require(self.seed < 2**63, "seed", "must be below 2**63")
        self.require(
            self.batch_size % self.accumulate == 0, "accumulate", f"must divide batch_size = {self.batch_size}"
        )

    @property
    def part_size(self) -> int:
        """Samples that go through the model at once in training."""
        return self.batch_size // self.accumulate

    @property
    def evaluation_size(self) -> int:
        """Samples that go through the model at once in an evaluation."""
        return self.eval_batch_size or self.part_size

    def captures(self, device: torch.device) -> bool:
        """Whether steps on a device shall be captured.

        Raises:
            ConfigError: they shall be, and cannot be there.
        """
        if self.capture and device.type != "cuda":
            raise ConfigError(f"train.capture: must be false or null on the device {device.type}, got true")
        return device.type == "cuda" if self.capture is None else self.capture

    def source(self, device: torch.device) -> Source:
        """Where batches for a device are put together."""
        return Source(device, self.resident, self.workers)


@dataclass(kw_only=True, frozen=True)
class Recipe(BaseConfig):
    """Everything that a training run is made of."""

    model: Model.Config
    data: Data.Config
    train: TrainConfig
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)

    def __post_init__(self) -> None:
        warmup, steps = self.optimiser.warmup, self.train.steps
        if warmup >= steps:
            raise SpecError(f"optimiser.warmup: must be below train.steps = {steps}, got {warmup}")


def recipe_names() -> list[str]:
    """The recipes that ship with the library."""
    return sorted(file.name.removesuffix(".yaml") for file in _folder().iterdir() if file.suffix == ".yaml")


def recipe_name(source: str) -> str:
    """The folder name for runs of the recipe: its name, or that of its file without the suffix."""
    return Path(source).stem if source.lower().endswith(SUFFIXES) else source


def load_recipe(source: str, *overrides: str) -> Recipe:
    """Read a recipe.

    Args:
        source: the name of a recipe that ships with the library, or the path of a ``.yaml`` file.
        *overrides: ``key=value`` from left to right: ``model.n_layers=6``, ``data.root=/data``, ``train.steps=100``.

    Raises:
        SpecError: there is no such recipe, or it is not valid.
    """
    if source.lower().endswith(SUFFIXES):
        return load_as(source, Recipe, *overrides)
    if source not in recipe_names():
        close = difflib.get_close_matches(source, recipe_names(), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise SpecError(
            f"no recipe named {source!r}{hint} (known: {', '.join(recipe_names())}, or a path of a .yaml file)"
        )
    return load_as(_folder() / f"{source}.yaml", Recipe, *overrides)


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe with every value written out; reading it again gives the same recipe."""
    return to_yaml(recipe)


def _folder() -> Path:
    return Path(str(files("sma_models.training").joinpath("recipes")))
