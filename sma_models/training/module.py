"""The Lightning module: losses, the learning rate of each step, and the rate controllers."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from sma.interfaces import Model
from sma.layer import SparseMixture
from sma.routing import Routing
from sma_models.training.data.datasets import Batch, Kind
from sma_models.training.objective import run_model, score
from sma_models.training.optimisation import build_optimiser, learning_rate
from sma_models.training.recipe import Recipe


class TrainingModule(LightningModule):
    """Trains a model on batches of one kind.

    Everything random in a step follows from the seed of the recipe and the number of the step, so a run that
    continues at step k
    draws what it would have drawn without the interruption.

    Args:
        model: what is trained.
        kind: of the batches.
        recipe: the optimiser and the training plan.

    Attributes:
        step: optimiser steps done.
        loss: of the last step, a scalar on the model's device: task and auxiliary losses, averaged over the parts of
            the batch.
        answers: of the last step: cross-entropy, right answers and answers asked for, ``(3,)``.
        routings: of the last part of the last step's batch.
    """

    def __init__(self, model: Model, kind: Kind, recipe: Recipe) -> None:
        super().__init__()
        self.model = model
        self.batch_kind = kind
        self.recipe = recipe
        self.step = 0
        self.loss = torch.zeros(())
        self.answers = torch.zeros(3)
        self.routings: Mapping[str, Routing] = {}
        self.before_step: Callable[[], None] | None = None
        self._part = 0
        self._observed: dict[str, list[Routing]] = {}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one part of a step's batch."""
        seed_everything(self.recipe.train.seed, self.step, self._part)
        output = run_model(self.model, batch, self.batch_kind)
        result = score(output, batch, self.batch_kind)
        loss = result.loss / result.count.clamp(min=1) + sum(output.losses.values())
        self._note(loss.detach(), torch.stack([result.loss.detach(), result.correct, result.count]), output.routings)
        return loss

    def _note(self, loss: Tensor, answers: Tensor, routings: Mapping[str, Routing]) -> None:
        share = loss / self.recipe.train.accumulate
        first = self._part == 0
        self.loss = share if first else self.loss + share
        self.answers = answers if first else self.answers + answers
        self.routings = {name: routing.detach() for name, routing in routings.items()}
        for name, routing in self.routings.items():
            if self.layer(name).controller is not None:
                self._observed.setdefault(name, []).append(routing)
        self._part += 1

    def layer(self, name: str) -> SparseMixture:
        """The sparsely activated layer that a routing comes from; a two-tower model names its towers in front of it."""
        path = name[name.find("layers.") :] if "layers." in name else name
        return next(
            module
            for where, module in self.model.named_modules()
            if isinstance(module, SparseMixture) and f".{where}".endswith(f".{path}")
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The recipe's optimiser."""
        return build_optimiser(self.recipe.optimiser, self.model.parameters())

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """One step at the learning rate of its number; then the controllers correct the rates that they watch."""
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe.optimiser, self.step, self.recipe.train.steps)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.control_rates()
        self.step += 1
        self._part = 0

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Lets an observer see the gradients before they are clipped."""
        if self.before_step is not None:
            self.before_step()

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip to the recipe's norm.

        Lightning declines to clip for fused optimisers in mixed precision, since they may unscale gradients themselves;
        bfloat16 needs no scaling, so there is nothing in the way.
        """
        if self.recipe.optimiser.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.optimiser.clip)

    def control_rates(self) -> None:
        """Let each controller correct the balance of its layer, once for all that the layer decided in this step."""
        by_layer: dict[SparseMixture, list[Routing]] = {}
        for name, routings in self._observed.items():
            by_layer.setdefault(self.layer(name), []).extend(routings)
        for layer, routings in by_layer.items():
            assert layer.controller is not None
            layer.controller.update(layer.configurator, joined(routings))
        self._observed.clear()

    def gradient_norm(self) -> float:
        """The norm of all gradients together."""
        norms = [parameter.grad.norm() for parameter in self.model.parameters() if parameter.grad is not None]
        return float(torch.stack(norms).norm()) if norms else 0.0


def joined(routings: list[Routing]) -> Routing:
    """The tokens of several routings as one sequence: only counts are taken from it."""

    def flat(tensors: list[Tensor]) -> Tensor:
        return torch.cat([tensor.flatten(0, 1) for tensor in tensors])[None]

    return Routing(
        flat([routing.active for routing in routings]),
        flat([routing.confidence for routing in routings]),
        flat([routing.valid for routing in routings]),
        flat([routing.position for routing in routings]),
    )


def seed_everything(seed: int, step: int, part: int = 0) -> None:
    """Start every generator afresh, from numbers that no other step shares."""
    digest = hashlib.blake2b(f"{seed}/{step}/{part}".encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "big")
    torch.manual_seed(number >> 1)
    random.seed(number)
    np.random.seed(number % 2**32)


def parameter_count(model: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
