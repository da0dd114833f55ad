"""ema_step: checks, and the choice of a backend."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op, lazy
from sma.ops.kernel import why_not_interpreted, why_not_triton
from sma.ops.row_norm import WIDEST, RowNorm
from sma_modules.ops.ema.types import Activation
from sma_modules.ops.ema_step import eager, reference
from sma_modules.ops.ema_step.memory import Averages, Coefficients
from sma_modules.ops.ema_step.types import Signature, Step


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
    the input that a truncation drops. README.md says how that stays exact. Slots that are not live keep their memory.

    Args:
        x: ``(S, D)``.
        averages: the memory; changes in place.
        coefficients: derived from the parameters of the average.
        live: ``(S,)`` slots that take a token.
        position: ``(S,)`` int64: tokens that each slot has taken before.
        norm: applied to ``x`` first, rounded to its dtype; or None.
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
    step = Step(live, position, norm, activation)
    return OP.chosen(_signature(x, averages, coefficients, step)).run(  # type: ignore[no-any-return]
        x, averages, coefficients, step
    )


def _signature(x: Tensor, averages: Averages, coefficients: Coefficients, step: Step) -> Signature:
    return Signature(x.device, x.dtype, x.shape[1], step.norm is not None, x.numel() == 0)


def _why_not_triton(signature: Signature) -> str | None:
    if signature.width > WIDEST and signature.normalised:
        return f"the kernel normalises at most {WIDEST} features, got {signature.width}"
    if signature.empty:
        return "there is nothing to compute"
    return why_not_triton(signature.device, signature.dtype)


OP = Op("ema_step", _signature)
OP.register(
    "triton",
    lazy("sma_modules.ops.ema_step.launch", "ema_step"),
    priority=10,
    applies=_why_not_triton,
    pays=why_not_interpreted,
)
OP.register("eager", eager.ema_step)
OP.register("reference", reference.ema_step, priority=90)
