"""Bring the share of active tokens of a model to a given value, without touching how it decides or what it computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sma.activated import Activated
from sma.layer import SparseMixture

TRIES = 60


@torch.no_grad()
def settle(controls: Sequence[Tensor], measure: Callable[[], Sequence[float]], target: float) -> float:
    """Move what is added to the logits of each layer until the layer's share of active tokens is near the target.

    Each layer takes steps of its own towards its target, shorter ones after it passed it (Riedmiller and Braun 1993):
    the layers may depend on each other, and a share may jump.

    Args:
        controls: one-element views, one for each layer, of what favours activation.
        measure: the shares with the present values, one for each layer.
        target: the share.

    Returns:
        The mean share that was reached.
    """
    if target >= 1:
        for control in controls:
            control.fill_(1e4)
        return _mean(measure())
    steps, last = [0.25] * len(controls), [0.0] * len(controls)
    for control in controls:
        control.zero_()
    shares = measure()
    for _ in range(TRIES):
        if all(abs(share - target) <= max(0.02 * target, 0.001) for share in shares):
            break
        for i, (control, share) in enumerate(zip(controls, shares, strict=True)):
            towards = float(share < target) - float(share > target)
            steps[i] *= 0.5 if towards * last[i] < 0 else 1.3 if towards * last[i] > 0 else 1.0
            last[i] = towards
            control.add_(towards * steps[i])
        shares = measure()
    return _mean(shares)


def _mean(shares: Sequence[float]) -> float:
    return sum(shares) / len(shares)


class Ours(nn.Module):
    """A model of this library as a function from inputs to logits (or a layer, to its output).

    Args:
        model: a model, or a sparsely activated layer.
        share: of active tokens to settle at; None where nothing is decided.

    Attributes:
        overflow: tokens dropped for lack of capacity when the share was last measured.
    """

    def __init__(self, model: nn.Module, share: float | None) -> None:
        super().__init__()
        self.model = model
        self.share = share
        self.overflow = 0
        self._seen: list[float] | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        out: Any = self.model(inputs)
        if self._seen is not None:
            routings = [out.routing] if isinstance(out, Activated) else list(out.routings.values())
            self.overflow = sum(int(routing.overflow.sum()) for routing in routings if routing.overflow is not None)
            self._seen = [float(routing.rate().mean()) for routing in routings]
        logits: Tensor = out.output if isinstance(out, Activated) else out.x if hasattr(out, "x") else out.logits
        return logits

    def settle(self, forward: Callable[[], None]) -> float:
        """Move the ``balance`` of every configurator; returns the share that was reached."""
        assert self.share is not None
        layers = [layer for layer in self.modules() if isinstance(layer, SparseMixture)]
        controls = [layer.configurator.balance[:1] for layer in layers]

        def measure() -> list[float]:
            self._seen = []
            try:
                forward()
                return self._seen
            finally:
                self._seen = None

        return settle(controls, measure, self.share)


@contextmanager
def watched(modules: Sequence[nn.Module], seen: list[float]) -> Any:
    """Note the share of tokens whose second option is the likelier one, of modules that give probabilities."""

    def note(module: nn.Module, args: Any, probabilities: Tensor) -> None:
        seen.append(float((probabilities.max(-1).indices == 1).float().mean()))

    hooks = [module.register_forward_hook(note) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
