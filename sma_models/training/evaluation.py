"""Judging a model on a split of its task."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sma.errors import ConfigError
from sma.routing import Routing
from sma_models.training.data.batching import BatchPlan, loader
from sma_models.training.data.datasets import Batch
from sma_models.training.objective import Score, place, quality, run_model, score
from sma_models.training.recipe import TrainConfig
from sma_models.training.sources import Task


@dataclass(frozen=True)
class Evaluation:
    """The result on a split.

    Attributes:
        loss: mean cross-entropy in nats.
        quality: ``bits_per_byte`` or ``accuracy``.
        rates: activation rate over all real tokens, by layer, one number for each module.
        count: answers that were judged.
    """

    loss: float
    quality: dict[str, float]
    rates: dict[str, list[float]]
    count: int

    def as_dict(self) -> dict[str, Any]:
        """For a summary."""
        return {"loss": self.loss, **self.quality, "count": self.count, "activation_rate": self.rates}


class RateMeter:
    """Counts active and real tokens per layer and module over batches."""

    def __init__(self) -> None:
        self._counts: dict[str, tuple[Tensor, int]] = {}

    def add(self, routings: Mapping[str, Routing]) -> None:
        """Count a batch."""
        for name, routing in routings.items():
            active, valid = routing.active.sum((0, 1)).cpu(), int(routing.valid.sum())
            if name in self._counts:
                active, valid = active + self._counts[name][0], valid + self._counts[name][1]
            self._counts[name] = (active, valid)

    def rates(self) -> dict[str, list[float]]:
        """The share of real tokens that were active, by layer and module."""
        return {name: (active.double() / max(valid, 1)).tolist() for name, (active, valid) in self._counts.items()}


def batches_of(task: Task, split: str, config: TrainConfig, limit: int | None = None) -> Iterable[Batch]:
    """The batches of a split: all in order, or ``limit`` of them drawn at random, the same ones every time."""
    samples = task.split(split)
    size = len(samples)  # type: ignore[arg-type]  # every split has an end
    limited = limit is not None and limit * config.evaluation_size < size
    plan = BatchPlan(size, config.evaluation_size, seed=0, shuffle=limited, drop_last=False)
    stop = limit if limited else plan.batches_per_epoch
    return loader(samples, plan, stop=stop, workers=config.workers)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    split: str,
    config: TrainConfig,
    *,
    limit: int | None = None,
) -> Evaluation:
    """Judge ``model`` on a split, in evaluation mode; it leaves the model and the random number generators as they are.

    Args:
        model: on the device where it is to run.
        task: the data.
        split: one of its splits.
        config: sizes of the batches and precision.
        limit: at most so many batches, drawn at random; None means the whole split.

    Raises:
        ConfigError: there is no such split.
    """
    lanes = task.lanes(split, config.evaluation_size) if task.lanes is not None and limit is None else None
    task.split(split)
    batches: Any = lanes if lanes is not None else batches_of(task, split, config, limit)
    parameter = next(model.parameters())
    meter, sums = RateMeter(), None
    with torch.random.fork_rng(devices=[]), _evaluation_mode(model), autocast(config, parameter.device):
        state = model.initial_state(config.evaluation_size) if lanes is not None else None  # type: ignore[operator]
        for batch in _in_order(batches):
            placed = place(batch, parameter.device, parameter.dtype)
            output = run_model(model, placed, task.kind, state)
            state = output.state
            result = score(output, placed, task.kind).exact()
            sums = result if sums is None else sums + result
            meter.add(output.routings)
    return _evaluation(task, split, sums, meter)


def _in_order(batches: Any) -> Iterator[Batch]:
    # Lanes are no iterable of their own: they are numbered batches.
    return iter(batches) if isinstance(batches, Iterable) else (batches[k] for k in range(len(batches)))


def _evaluation(task: Task, split: str, sums: Score | None, meter: RateMeter) -> Evaluation:
    count = 0 if sums is None else int(sums.count)
    if sums is None or count == 0:
        raise ConfigError(f"split: {split!r} must hold something to predict, got none")
    loss, accuracy = float(sums.loss) / count, float(sums.correct) / count
    return Evaluation(loss, quality(task.kind, loss, accuracy), meter.rates(), count)


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def autocast(config: TrainConfig, device: torch.device) -> Any:
    """The context in which a model of this precision runs."""
    if config.precision != "bfloat16":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)
