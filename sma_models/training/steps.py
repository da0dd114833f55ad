"""One optimiser step: forward and backward passes over the parts of a batch, then the update."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sma.configurators import RateController
from sma.interfaces import Model
from sma.layer import SparseMixture
from sma.routing import Routing
from sma_models.training.data.batches import Batch, Kind
from sma_models.training.evaluation import autocast
from sma_models.training.objective import Score, run_model, score
from sma_models.training.optimisation import learning_rate, set_learning_rate
from sma_models.training.recipe import Recipe


@dataclass(frozen=True)
class PartResult:
    """The result of one part of a batch, or of all parts together.

    Attributes:
        loss: a scalar on the model's device: task and auxiliary losses, averaged over the parts of the batch.
        answers: how the model did.
        routings: of the last part.
    """

    loss: Tensor
    answers: Score
    routings: Mapping[str, Routing]

    def __add__(self, later: PartResult) -> PartResult:
        return PartResult(self.loss + later.loss, self.answers + later.answers, later.routings)


@dataclass(frozen=True)
class StepResult(PartResult):
    """The result of a step.

    Attributes:
        gradient_norm: of all gradients together, before they were clipped, a scalar on the device; None if it was not
            requested.
    """

    gradient_norm: Tensor | None = None


class Steps(Protocol):
    """A way to run steps. Calls only queue work for the device; a method that synchronises with it says so."""

    def run(self, step: int, parts: Sequence[Batch], *, norm: bool = False) -> None:
        """Run step number ``step`` with a batch in equal parts; ``norm`` requests the norm of the gradient."""

    def settle(self) -> StepResult:
        """Make sure that no step was skipped, and return the result of the last one."""


class Work:
    """The work of every step, however it is run.

    Args:
        model: what is trained, on its device.
        kind: of the batches.
        recipe: the optimiser and the training plan.
        optimiser: of the model's parameters.
    """

    def __init__(self, model: Model, kind: Kind, recipe: Recipe, optimiser: torch.optim.Optimizer) -> None:
        self.model = model
        self.kind = kind
        self.recipe = recipe
        self.optimiser = optimiser
        self.trained = [parameter for group in optimiser.param_groups for parameter in group["params"]]
        self.device: torch.device = self.trained[0].device
        self._layers: dict[str, SparseMixture] = {}
        self._counts: dict[SparseMixture, Tensor] = {}

    def layer(self, name: str) -> SparseMixture:
        """The sparsely activated layer that a routing comes from; a two-tower model names its towers in front of it."""
        if name not in self._layers:
            path = name[name.find("layers.") :] if "layers." in name else name
            self._layers[name] = next(
                module
                for where, module in self.model.named_modules()
                if isinstance(module, SparseMixture) and f".{where}".endswith(f".{path}")
            )
        return self._layers[name]

    def prepare(self, step: int, number: int) -> None:
        """Start every random number generator where part ``number`` of a step begins."""
        seed_everything(self.recipe.train.seed, step, number, self.device)

    def set_rate(self, step: int) -> None:
        """Bring the learning rate to that of the step."""
        set_learning_rate(self.optimiser, learning_rate(self.recipe.optimiser, step, self.recipe.train.steps))

    def forward_backward(self, batch: Batch) -> PartResult:
        """The passes over one part; gradients and the counts of controllers are added to those of earlier parts."""
        with autocast(self.recipe.train, self.device):
            output = run_model(self.model, batch, self.kind)
            result = score(output, batch, self.kind)
            loss = result.loss / result.count.clamp(min=1) + sum(output.losses.values())
            loss = loss / self.recipe.train.accumulate
        torch.autograd.backward(loss)
        routings = {name: routing.detach() for name, routing in output.routings.items()}
        self.count(routings)
        return PartResult(loss.detach(), result.detach(), routings)

    def count(self, routings: Mapping[str, Routing]) -> None:
        """Count for the controllers of the rates."""
        for name, routing in routings.items():
            layer = self.layer(name)
            if layer.controller is not None:
                counts = RateController.counts(routing)
                self._counts[layer] = self._counts[layer].add_(counts) if layer in self._counts else counts

    def forget_counts(self) -> None:
        """Reset the counts for the controllers."""
        for counts in self._counts.values():
            counts.zero_()

    def update(self, *, norm: bool) -> Tensor | None:
        """Clip, let the optimiser step, let each controller correct its layer; the norm, where it is known."""
        clip = self.recipe.optimiser.clip
        total: Tensor | None = None
        if clip is not None:
            total = nn.utils.clip_grad_norm_(self.trained, clip)
        elif norm:
            total = nn.utils.get_total_norm([each.grad for each in self.trained if each.grad is not None])
        self.optimiser.step()
        self.control_rates()
        return total

    def control_rates(self) -> None:
        """Let each controller correct the balance of its layer, once for all that the layer decided in this step."""
        for layer, counts in self._counts.items():
            assert layer.controller is not None
            layer.controller.correct(layer.configurator, counts)
        self.forget_counts()


class EagerSteps:
    """Launches every operation of a step by itself."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self._last: StepResult | None = None

    def run(self, step: int, parts: Sequence[Batch], *, norm: bool = False) -> None:
        """See :class:`Steps`."""
        work = self.work
        work.set_rate(step)
        work.optimiser.zero_grad()
        total: PartResult | None = None
        for number, batch in enumerate(parts):
            work.prepare(step, number)
            part = work.forward_backward(batch)
            total = part if total is None else total + part
        assert total is not None
        self._last = StepResult(total.loss, total.answers, total.routings, work.update(norm=norm))

    def settle(self) -> StepResult:
        """See :class:`Steps`."""
        assert self._last is not None
        return self._last


def seed_everything(seed: int, step: int, part: int = 0, device: torch.device | None = None) -> None:
    """Start every generator afresh, that of ``device`` too, from numbers that no other step shares.

    ``torch.manual_seed`` also queues a seed for uninitialised devices, which is slow.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{part}".encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "big")
    torch.default_generator.manual_seed(number >> 1)
    if device is not None and device.type != "cpu":
        torch.get_device_module(device).manual_seed(number >> 1)
    random.seed(number)
    np.random.seed(number % 2**32)
