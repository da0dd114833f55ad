"""The evaluation of a model on a split of its task."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sma.errors import ConfigError
from sma.routing import Routing
from sma_models.training.data.base import Task
from sma_models.training.data.batches import Batch
from sma_models.training.data.batching import CPU, BatchPlan, loader
from sma_models.training.objective import Score, place, quality, run_model, score
from sma_models.training.recipe import TrainConfig


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
    """Counts active and real tokens per layer and module, on the device; :meth:`rates` synchronises with it."""

    def __init__(self) -> None:
        self._counts: dict[str, Tensor] = {}

    def add(self, routings: Mapping[str, Routing]) -> None:
        """Count a batch."""
        for name, routing in routings.items():
            counts = torch.cat([routing.active.sum((0, 1)), routing.valid.sum()[None]])
            self._counts[name] = counts + self._counts[name] if name in self._counts else counts

    def rates(self) -> dict[str, list[float]]:
        """The share of real tokens that were active, by layer and module."""
        if not self._counts:
            return {}
        together = torch.cat(list(self._counts.values())).cpu().double()
        parts = torch.split(together, [counts.numel() for counts in self._counts.values()])
        rates = [(part[:-1] / part[-1].clamp(min=1)).tolist() for part in parts]
        return dict(zip(self._counts, rates, strict=True))


def batches_of(
    task: Task, split: str, config: TrainConfig, limit: int | None = None, device: torch.device | None = None
) -> Iterable[Batch]:
    """The batches of a split, for a device: all in order, or ``limit`` of them drawn at random, the same ones every
    time.
    """
    samples = task.split(split)
    size = len(samples)  # type: ignore[arg-type]  # every split has an end
    limited = limit is not None and limit * config.evaluation_size < size
    plan = BatchPlan(size, config.evaluation_size, seed=0, shuffle=limited, drop_last=False)
    stop = limit if limited else plan.batches_per_epoch
    return loader(samples, plan, stop=stop, source=config.source(device or CPU))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Task,
    split: str,
    config: TrainConfig,
    *,
    limit: int | None = None,
) -> Evaluation:
    """Evaluate ``model`` on a split, in evaluation mode; it leaves the model and the random number generators as they
    are.

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
    parameter = next(model.parameters())
    batches: Any = lanes if lanes is not None else batches_of(task, split, config, limit, parameter.device)
    meter, scores = RateMeter(), list[Score]()
    with torch.random.fork_rng(devices=[]), _evaluation_mode(model), autocast(config, parameter.device):
        state = model.initial_state(config.evaluation_size) if lanes is not None else None  # type: ignore[operator]
        for batch in _in_order(batches):
            placed = place(batch, parameter.device, parameter.dtype)
            output = run_model(model, placed, task.kind, state)
            state = output.state
            scores.append(score(output, placed, task.kind))
            meter.add(output.routings)
    return _evaluation(task, split, scores, meter)


def _in_order(batches: Any) -> Iterator[Batch]:
    # Lanes are no iterable of their own: they are numbered batches.
    return iter(batches) if isinstance(batches, Iterable) else (batches[k] for k in range(len(batches)))


def _evaluation(task: Task, split: str, scores: list[Score], meter: RateMeter) -> Evaluation:
    loss, correct, count = Score.total(scores) if scores else (0.0, 0, 0)
    if count == 0:
        raise ConfigError(f"split: {split!r} must hold something to predict, got none")
    return Evaluation(loss / count, quality(task.kind, loss / count, correct / count), meter.rates(), count)


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
