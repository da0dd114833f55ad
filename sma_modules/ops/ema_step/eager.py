"""One step of the average with PyTorch's own functions, in fixed shapes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sma.ops.row_norm.eager import row_norm
from sma.steppers import choose
from sma_modules.ops.ema_step.memory import Averages, Coefficients
from sma_modules.ops.ema_step.types import Step


def ema_step(x: Tensor, averages: Averages, coefficients: Coefficients, step: Step) -> Tensor:
    """All slots and channels at once; the averages change in place."""
    inputs = (x if step.norm is None else row_norm(x, step.norm)).to(averages.hidden.dtype)
    slot = torch.arange(x.shape[0], device=x.device)
    before, after = step.position % averages.versions, (step.position + 1) % averages.versions
    entering = inputs[..., None] * coefficients.drive
    hidden = averages.hidden[before, slot]
    hidden = hidden - coefficients.loss * hidden + entering
    if (
        averages.fresh is not None
        and averages.count is not None
        and averages.history is not None
        and averages.truncation is not None
        and coefficients.leaving is not None
    ):
        rows = averages.history.shape[1]
        gone = averages.history[slot, (step.position - averages.truncation) % rows].to(hidden.dtype)
        hidden = hidden - gone[..., None] * coefficients.leaving
        _store(averages.history, slot, step.position % rows, inputs.to(averages.history.dtype), step.live)
        fresh = averages.fresh[before, slot]
        fresh = fresh - coefficients.loss * fresh + entering
        count = averages.count[step.position % averages.count.shape[0], slot] + 1
        full = count == averages.truncation
        hidden = torch.where(full[:, None, None], fresh, hidden)
        _store(averages.fresh, after, slot, fresh.masked_fill(full[:, None, None], 0), step.live)
        versions = averages.count.shape[0]
        _store(averages.count, (step.position + 1) % versions, slot, count.masked_fill(full, 0), step.live)
    _store(averages.hidden, after, slot, hidden, step.live)
    y = (hidden * coefficients.read).sum(-1).addcmul(coefficients.omega, inputs)
    y = F.silu(y) if step.activation == "silu" else y
    return y.masked_fill(~step.live[:, None], 0).to(x.dtype)


def _store(memory: Tensor, first: Tensor, second: Tensor, value: Tensor, live: Tensor) -> None:
    """``memory[first, second] = value`` in live slots."""
    memory[first, second] = choose(live, value, memory[first, second])
