"""The Lightning module: it collects the parts of a step's batch and runs the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from sma.interfaces import Model
from sma.routing import Routing
from sma_models.training.captured import CapturedSteps
from sma_models.training.data.batches import Batch, Kind
from sma_models.training.objective import Score
from sma_models.training.optimisation import build_optimiser
from sma_models.training.recipe import Recipe
from sma_models.training.steps import EagerSteps, Steps, Work


class TrainingModule(LightningModule):
    """Trains a model on batches of one kind.

    Everything random in a step follows from the seed of the recipe and the number of the step, so a run that
    continues at step k draws what it would have drawn without the interruption.

    A step only queues work for the device; only :meth:`settle` synchronises with it.

    Args:
        model: what is trained.
        kind: of the batches.
        recipe: the optimiser and the training plan.

    Attributes:
        step: optimiser steps done.
        loss: of the last step that was settled, a scalar on the model's device: task and auxiliary losses, averaged
            over the parts of the batch.
        answers: of the same step.
        gradient_norm: of all gradients of the same step together, before they were clipped, a scalar on the device;
            None if it was not requested.
        routings: of the last part of the same step's batch.
    """

    def __init__(self, model: Model, kind: Kind, recipe: Recipe) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.batch_kind = kind
        self.recipe = recipe
        self.step = 0
        self.loss = torch.zeros(())
        self.answers: Score | None = None
        self.gradient_norm: Tensor | None = None
        self.routings: Mapping[str, Routing] = {}
        self.wants_norm: Callable[[int], bool] = lambda step: False
        self._steps: Steps | None = None
        self._parts: list[Batch] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The recipe's optimiser."""
        return build_optimiser(self.recipe.optimiser, self.model.parameters())

    @property
    def steps(self) -> Steps:
        """The way that steps are run, captured in CUDA graphs where the recipe and the device allow it."""
        if self._steps is None:
            work = Work(self.model, self.batch_kind, self.recipe, self.trainer.optimizers[0])
            captures = self.recipe.train.captures(work.device)
            self._steps = (
                CapturedSteps(work, required=bool(self.recipe.train.capture)) if captures else EagerSteps(work)
            )
        return self._steps

    @property
    def captured(self) -> CapturedSteps | None:
        """The steps, if they are captured or were to be."""
        return self._steps if isinstance(self._steps, CapturedSteps) else None

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep a part of a batch; with the last one, run the step."""
        self._parts.append(batch)
        if len(self._parts) == self.recipe.train.accumulate:
            self.steps.run(self.step, self._parts, norm=self.wants_norm(self.step + 1))
            self._parts = []
            self.step += 1

    def settle(self) -> None:
        """Make sure that no step was skipped, and take over the result of the last one."""
        result = self.steps.settle()
        self.loss, self.answers = result.loss, result.answers
        self.gradient_norm, self.routings = result.gradient_norm, result.routings


def parameter_count(model: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
