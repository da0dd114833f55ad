"""The kernel as an operator."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sma.ops.kernel import kernel, next_power_of_2
from sma.ops.row_norm.launch import stride
from sma_modules.ops.ema_step import triton_kernel as kernels
from sma_modules.ops.ema_step.memory import Averages, Coefficients
from sma_modules.ops.ema_step.types import Step

CHANNELS, WARPS = 32, 4
"""Channels of a program."""


def _fake(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


@kernel("ema_step", fake=_fake, mutates=("hidden", "fresh", "count", "history"))
def run(
    x: Tensor,
    hidden: Tensor,
    fresh: Tensor | None,
    count: Tensor | None,
    history: Tensor | None,
    loss: Tensor,
    drive: Tensor,
    read: Tensor,
    leaving: Tensor | None,
    omega: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    live: Tensor,
    position: Tensor,
    taps: int,
    norm: bool,
    centred: bool,
    eps: float,
    silu: bool,
) -> Tensor:
    """The output ``(S, D)``; the memory changes in place."""
    x = x.contiguous()
    out = x.new_empty(x.shape)
    slots, dim = x.shape
    n_state = loss.shape[1]
    kernels.step_kernel[(slots, -(-dim // CHANNELS))](
        x, hidden, fresh, count, history, loss, drive, read, leaving, omega, norm_weight, norm_bias, live, position,
        out, slots, eps,
        D=dim, N=n_state, VERSIONS=hidden.shape[0], TAPS=taps, ROWS=0 if history is None else history.shape[1],
        NORM=norm, CENTRED=centred, WEIGHT_STRIDE=stride(norm_weight), HAS_BIAS=norm_bias is not None, SILU=silu,
        WIDTH=next_power_of_2(max(dim, 1)), BD=CHANNELS, BN=next_power_of_2(max(n_state, 1)), num_warps=WARPS,
    )  # fmt: skip
    return out


def ema_step(x: Tensor, averages: Averages, coefficients: Coefficients, step: Step) -> Tensor:
    """See :func:`sma_modules.ops.ema_step.ema_step`."""
    norm = step.norm
    out: Tensor = run(
        x,
        averages.hidden,
        averages.fresh,
        averages.count,
        averages.history,
        coefficients.loss,
        coefficients.drive,
        coefficients.read,
        coefficients.leaving,
        coefficients.omega,
        None if norm is None else norm.weight,
        None if norm is None else norm.bias,
        step.live,
        step.position,
        averages.truncation or 0,
        norm is not None,
        norm is not None and norm.centred,
        0.0 if norm is None else norm.eps,
        step.activation == "silu",
    )
    return out
