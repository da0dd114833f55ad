"""One step of the damped moving average, in place: the recurrence for one token of every sequence."""

from __future__ import annotations

from typing import Literal, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op
from sma.ops.kernel import why_not_triton_on
from sma.ops.row_norm import WIDEST, RowNorm
from sma_modules.ops.ema_step.eager import ema_step_eager
from sma_modules.ops.ema_step.memory import Averages, Coefficients
from sma_modules.ops.ema_step.reference import ema_step_reference

__all__ = ["OP", "Averages", "Coefficients", "ema_step"]

OP = Op("ema_step")
Activation = Literal["none", "silu"]


class Step(NamedTuple):
    """What happens in a step, see :func:`ema_step`."""

    live: Tensor
    position: Tensor
    norm: RowNorm | None
    activation: Activation


def _why_not_triton(x: Tensor, averages: Averages, coefficients: Coefficients, step: Step) -> str | None:
    if x.shape[1] > WIDEST and step.norm is not None:
        return f"the kernel normalises at most {WIDEST} features, got {x.shape[1]}"
    return "there is nothing to compute" if x.numel() == 0 else why_not_triton_on(x)


@OP.backend("triton", priority=10, applies=_why_not_triton)
def _triton(x: Tensor, averages: Averages, coefficients: Coefficients, step: Step) -> Tensor:
    from sma_modules.ops.ema_step.launch import ema_step_triton

    return ema_step_triton(x, averages, coefficients, step)


OP.backend("eager", priority=50)(ema_step_eager)
OP.backend("reference", priority=90)(ema_step_reference)


def ema_step(
    x: Float[Tensor, "slots dim"],
    averages: Averages,
    coefficients: Coefficients,
    *,
    live: Bool[Tensor, " slots"],
    position: Int[Tensor, " slots"],
    norm: RowNorm | None = None,
    activation: Activation = "none",
) -> Float[Tensor, "slots dim"]:
    """``activation(average + omega * n)`` with ``n = norm(x)``, and the averages one token further.

    The average is that of :func:`~sma_modules.ops.ema.ema`, one token at a time: ``S - loss * S + drive * n``, less
    what a truncation lets go of. README.md says how that stays exact. Slots that are not live keep their memory.

    Args:
        x: ``(S, D)``.
        averages: the memory; changes in place.
        coefficients: what the parameters of the average come to.
        live: ``(S,)`` who takes a token.
        position: ``(S,)`` int64: tokens that each slot has taken before.
        norm: applied to ``x`` first, rounded to its dtype; None for nothing.
        activation: "silu" or "none".

    Returns:
        ``(S, D)`` in the dtype of ``x``, zero in slots that are not live.

    Raises:
        ShapeError: the sizes do not fit.
    """
    hidden = averages.hidden
    if x.dim() != 2 or hidden.shape[1:3] != x.shape or coefficients.loss.shape != hidden.shape[2:]:
        raise ShapeError(
            f"ema_step: x (S, D), averages (V, S, D, N) and coefficients (D, N) must agree, got {tuple(x.shape)}, "
            f"{tuple(hidden.shape)} and {tuple(coefficients.loss.shape)}"
        )
    out: Tensor = OP(x, averages, coefficients, Step(live, position, norm, activation))
    return out
