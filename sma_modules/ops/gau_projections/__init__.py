"""All that one token of every slot goes through in front of a gated attention unit, in a step of decoding."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op
from sma.ops.kernel import why_not_triton_on

__all__ = ["OP", "Projections", "gau_projections"]

OP = Op("gau_projections")


class Projections(NamedTuple):
    """``skip (S, D)``, and queries, keys ``(S, z)``, values and gate ``(S, h)``.

    All but the skip are meaningless, and may be anything at all, in slots that are not active.
    """

    skip: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    r: Tensor


def _why_not_triton(m: Tensor, skip: Linear, mx: Linear, affine: Affine, active: Tensor) -> str | None:
    if m.numel() == 0:
        return "there is nothing to compute"
    wrong = [each.dtype for each in (*skip, *mx) if each.dtype != m.dtype]
    if wrong:
        return f"the kernel takes weights of the dtype of the tokens, {m.dtype}, got {wrong[0]}"
    return why_not_triton_on(m)


class Linear(NamedTuple):
    """A weight ``(out, in)`` and a bias ``(out,)``."""

    weight: Tensor
    bias: Tensor


class Affine(NamedTuple):
    """What makes queries and keys, see :func:`~sma_modules.ops.gau_inputs.gau_inputs`."""

    gamma: Tensor
    beta: Tensor
    position: Tensor | None
    theta: float


@OP.backend("triton", priority=10, applies=_why_not_triton)
def _triton(m: Tensor, skip: Linear, mx: Linear, affine: Affine, active: Tensor) -> Projections:
    from sma_modules.ops.gau_projections.launch import gau_projections_triton

    return gau_projections_triton(m, skip, mx, affine, active)


def gau_projections(
    m: Float[Tensor, "slots dim"],
    skip: tuple[Float[Tensor, "dim_out dim"], Float[Tensor, " dim_out"]],
    mx: tuple[Float[Tensor, "width dim"], Float[Tensor, " width"]],
    *,
    gamma: Float[Tensor, "2 z"],
    beta: Float[Tensor, "2 z"],
    active: Bool[Tensor, " slots"],
    position: Int[Tensor, " slots"] | None = None,
    theta: float = 10000.0,
) -> Projections:
    """The skip path of every slot, and the inputs of the unit of active ones.

    ``skip = m W_skip^T + b_skip``, and :func:`~sma_modules.ops.gau_inputs.gau_inputs` of ``m W_mx^T + b_mx``.

    Args:
        m: ``(S, D)``.
        skip: weight ``(D', D)`` and bias.
        mx: weight ``(z + 2h, D)`` and bias.
        gamma: ``(2, z)``.
        beta: ``(2, z)``.
        active: ``(S,)``. Where nobody is, the weights of the unit are not even read.
        position: ``(S,)`` int64 original positions; None for no rotation.
        theta: the base of the wavelengths.

    Raises:
        ShapeError: the sizes do not fit.
    """
    z = gamma.shape[1]
    if skip[0].shape[1] != m.shape[1] or mx[0].shape[1] != m.shape[1] or mx[0].shape[0] < z:
        raise ShapeError(
            f"gau_projections: weights must take {m.shape[1]} features and mx give at least {z}, got "
            f"{tuple(skip[0].shape)} and {tuple(mx[0].shape)}"
        )
    if (mx[0].shape[0] - z) % 2 or (position is not None and z % 2):
        raise ShapeError(f"gau_projections: mx must give z + 2h features, z even if turned, got {tuple(mx[0].shape)}")
    out: Projections = OP(m, Linear(*skip), Linear(*mx), Affine(gamma, beta, position, theta), active)
    return out


from sma_modules.ops.gau_projections import eager, reference  # noqa: E402,F401  (registers the backends)
