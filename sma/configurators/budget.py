"""Holding the activation rate at a target: by a loss, or by a controller that needs none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from sma.configurable import BaseConfig, Configurable
from sma.interfaces import Configurator
from sma.routing import Routing


class RateLoss(Configurable):
    """A loss on the distance of the activation rate from ``target``.

    The rate is the share of active (token, module) pairs in the batch; its gradient is that of the mean score
    (straight-through). ``squared``: ``(rate - target)^2``; ``hinge``: ``max(0, rate - target)``, which only punishes
    too much; ``cross_entropy``: the binary cross-entropy of the rate against the target, less its minimum, so that 0
    means on target.
    """

    @dataclass(kw_only=True, frozen=True)
    class Config(BaseConfig):
        target: float
        kind: Literal["squared", "hinge", "cross_entropy"] = "squared"
        weight: float = 1.0

        def __post_init__(self) -> None:
            self.require(0 < self.target < 1, "target", "must lie strictly between 0 and 1")
            self.require(
                self.kind in ("squared", "hinge", "cross_entropy"), "kind", "must be squared, hinge or cross_entropy"
            )
            self.require(self.weight >= 0, "weight", "must not be negative")

    def __init__(self, config: Config) -> None:
        self.target = config.target
        self.kind = config.kind
        self.weight = config.weight

    def __call__(self, score: Tensor, active: Tensor, valid: Tensor) -> Tensor:
        """The weighted loss, a scalar.

        Args:
            score: ``(B, L, M)`` differentiable scores.
            active: ``(B, L, M)`` the decision.
            valid: ``(B, L)`` real tokens; the others do not count.
        """
        pairs = (valid.sum() * score.shape[-1]).clamp(min=1).to(score.dtype)
        mean_score = score.masked_fill(~valid[..., None], 0.0).sum() / pairs
        rate = (active & valid[..., None]).sum() / pairs + mean_score - mean_score.detach()
        if self.kind == "squared":
            loss = (rate - self.target).square()
        elif self.kind == "hinge":
            loss = torch.relu(rate - self.target)
        else:
            loss = _cross_entropy(rate, self.target) - _cross_entropy(torch.full_like(rate, self.target), self.target)
        return self.weight * loss


def _cross_entropy(rate: Tensor, target: float) -> Tensor:
    # The clamp keeps the value finite at rates of exactly 0 and 1; its gradient passes there on purpose.
    inside = rate + (rate.clamp(1e-4, 1 - 1e-4) - rate).detach()
    return -(target * inside.log() + (1 - target) * (1 - inside).log())


class RateController(Configurable):
    """Moves a configurator's ``balance`` towards a target rate, once per optimiser step; no loss and no gradient
    involved.

    ``balance += gain * (target - rate)`` per module, with the rate averaged over all ranks when training is
    distributed.
    """

    @dataclass(kw_only=True, frozen=True)
    class Config(BaseConfig):
        target: float
        gain: float = 0.1

        def __post_init__(self) -> None:
            self.require(0 < self.target < 1, "target", "must lie strictly between 0 and 1")
            self.require(self.gain > 0, "gain", "must be positive")

    def __init__(self, config: Config) -> None:
        self.target = config.target
        self.gain = config.gain

    def update(self, configurator: Configurator, routing: Routing) -> None:
        """Correct ``configurator.balance`` after a training step whose decision was ``routing``."""
        self.correct(configurator, self.counts(routing))

    @staticmethod
    def counts(routing: Routing) -> Tensor:
        """``(M + 1,)`` int64: the active tokens of each module and the real ones; those of several batches add up."""
        return torch.cat([routing.active.sum((0, 1)), routing.valid.sum()[None]])

    @torch.no_grad()
    def correct(self, configurator: Configurator, counts: Tensor) -> None:
        """Correct ``configurator.balance`` after a training step that gave these :meth:`counts`."""
        counts = counts.to(configurator.balance)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts)
        rate = counts[:-1] / counts[-1].clamp(min=1)
        configurator.balance.add_(self.gain * (self.target - rate))
