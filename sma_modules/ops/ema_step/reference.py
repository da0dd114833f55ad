"""The definition: one slot, one channel and one state at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from sma.ops.row_norm.reference import row_norm
from sma_modules.ops.ema_step.memory import Averages, Coefficients
from sma_modules.ops.ema_step.types import Step


def ema_step(x: Tensor, averages: Averages, coefficients: Coefficients, step: Step) -> Tensor:
    """Slot after slot; the averages change in place."""
    inputs = x if step.norm is None else row_norm(x, step.norm)
    inputs = inputs.to(averages.hidden.dtype)
    y = torch.zeros_like(inputs)
    loss, drive, read, leaving, omega = (
        coefficients.loss, coefficients.drive, coefficients.read, coefficients.leaving, coefficients.omega,
    )  # fmt: skip
    for s in range(x.shape[0]):
        if not step.live[s]:
            continue
        at = int(step.position[s])
        before, after = at % averages.versions, (at + 1) % averages.versions
        full = False
        if averages.count is not None and averages.truncation is not None:
            versions = averages.count.shape[0]
            count = int(averages.count[at % versions, s]) + 1
            full = count == averages.truncation
            averages.count[(at + 1) % versions, s] = 0 if full else count
        for d in range(x.shape[1]):
            now = inputs[s, d]
            gone = None
            if averages.history is not None and averages.truncation is not None:
                rows = averages.history.shape[1]
                gone = averages.history[s, (at - averages.truncation) % rows, d].clone().to(now.dtype)
                averages.history[s, at % rows, d] = now
            for n in range(loss.shape[1]):
                was = averages.hidden[before, s, d, n]
                state = was - loss[d, n] * was + drive[d, n] * now
                if gone is not None and leaving is not None and averages.fresh is not None:
                    state = state - leaving[d, n] * gone
                    new = averages.fresh[before, s, d, n]
                    new = new - loss[d, n] * new + drive[d, n] * now
                    state = new if full else state
                    averages.fresh[after, s, d, n] = 0 if full else new
                averages.hidden[after, s, d, n] = state
                y[s, d] += read[d, n] * state
            y[s, d] += omega[d] * now
    if step.activation == "silu":
        y = y / (1 + torch.exp(-y))
    return y.to(x.dtype)
