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
from sma_models.training.objective import Score, run_model, score
from sma_models.training.optimisation import build_optimiser, learning_rate
from sma_models.training.recipe import Recipe


class TrainingModule(LightningModule):
    """Trains a model on batches of one kind.

    Everything random in a step follows from the seed of the recipe and the number of the step, so a run that
    continues at step k
    draws what it would have drawn without the interruption.

    A step only queues work for the device: what it notes are tensors, and nothing here waits for their values.

    Args:
        model: what is trained.
        kind: of the batches.
        recipe: the optimiser and the training plan.

    Attributes:
        step: optimiser steps done.
        loss: of the last step, a scalar on the model's device: task and auxiliary losses, averaged over the parts of
            the batch.
        answers: of the last step.
        gradient_norm: of all gradients of the last step together, before they were clipped, a scalar on the device;
            None where nobody asked.
        routings: of the last part of the last step's batch.
    """

    def __init__(self, model: Model, kind: Kind, recipe: Recipe) -> None:
        super().__init__()
        self.model = model
        self.batch_kind = kind
        self.recipe = recipe
        self.step = 0
        self.loss = torch.zeros(())
        self.answers: Score | None = None
        self.gradient_norm: Tensor | None = None
        self.routings: Mapping[str, Routing] = {}
        self.wants_norm: Callable[[int], bool] = lambda step: False
        self._part = 0
        self._layers: dict[str, SparseMixture] = {}
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._observed: dict[str, list[Routing]] = {}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one part of a step's batch."""
        seed_everything(self.recipe.train.seed, self.step, self._part, self.device)
        output = run_model(self.model, batch, self.batch_kind)
        result = score(output, batch, self.batch_kind)
        loss = result.loss / result.count.clamp(min=1) + sum(output.losses.values())
        self._note(loss.detach(), result.detach(), output.routings)
        return loss

    def _note(self, loss: Tensor, answers: Score, routings: Mapping[str, Routing]) -> None:
        parts = self.recipe.train.accumulate
        share = loss / parts if parts > 1 else loss
        first = self._part == 0
        self.loss = share if first else self.loss + share
        self.answers = answers if first or self.answers is None else self.answers + answers
        self.routings = {name: routing.detach() for name, routing in routings.items()}
        for name, routing in self.routings.items():
            if self.layer(name).controller is not None:
                self._observed.setdefault(name, []).append(routing)
        self._part += 1

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

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The recipe's optimiser."""
        return build_optimiser(self.recipe.optimiser, self._trained)

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """One step at the learning rate of its number; then the controllers correct the rates that they watch."""
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe.optimiser, self.step, self.recipe.train.steps)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.control_rates()
        self.step += 1
        self._part = 0

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip to the recipe's norm, and keep what it was.

        Lightning declines to clip for fused optimisers in mixed precision, since they may unscale gradients themselves;
        bfloat16 needs no scaling, so there is nothing in the way.
        """
        clip = self.recipe.optimiser.clip
        if clip is not None:
            self.gradient_norm = nn.utils.clip_grad_norm_(self._trained, clip)
        elif self.wants_norm(self.step + 1):
            gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
            self.gradient_norm = nn.utils.get_total_norm(gradients)

    def control_rates(self) -> None:
        """Let each controller correct the balance of its layer, once for all that the layer decided in this step."""
        by_layer: dict[SparseMixture, list[Routing]] = {}
        for name, routings in self._observed.items():
            by_layer.setdefault(self.layer(name), []).extend(routings)
        for layer, routings in by_layer.items():
            assert layer.controller is not None
            layer.controller.update(layer.configurator, joined(routings))
        self._observed.clear()


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


def seed_everything(seed: int, step: int, part: int = 0, device: torch.device | None = None) -> None:
    """Start every generator afresh, that of ``device`` too, from numbers that no other step shares.

    ``torch.manual_seed`` would ask every kind of device that there might be; where there is none, that is most of the
    work, and is noted down for the day when one turns up.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{part}".encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "big")
    torch.default_generator.manual_seed(number >> 1)
    if device is not None and device.type != "cpu":
        torch.get_device_module(device).manual_seed(number >> 1)
    random.seed(number)
    np.random.seed(number % 2**32)


def parameter_count(model: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
