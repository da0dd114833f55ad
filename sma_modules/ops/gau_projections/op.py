"""gau_projections: the products in front of a gated attention unit; checks, and the choice of a backend."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op, lazy
from sma.ops.kernel import why_not_interpreted, why_not_triton
from sma_modules.ops.gau_inputs.types import Affine
from sma_modules.ops.gau_projections import eager, reference
from sma_modules.ops.gau_projections.types import Projections, Signature, Weights


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
        active: ``(S,)``. The kernel does not read the weights of the unit where no slot is active.
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
        raise ShapeError(
            f"gau_projections: mx must give z + 2h features, an even z with positions, got {tuple(mx[0].shape)}"
        )
    weights, affine = Weights(*skip, *mx), Affine(gamma, beta, position, theta)
    return OP.chosen(_signature(m, weights, affine, active)).run(m, weights, affine, active)  # type: ignore[no-any-return]


def _signature(m: Tensor, weights: Weights, affine: Affine, active: Tensor) -> Signature:
    skip, skip_bias, mx, mx_bias = weights
    return Signature(m.device, m.dtype, (skip.dtype, skip_bias.dtype, mx.dtype, mx_bias.dtype), m.numel() == 0)


def _why_not_triton(signature: Signature) -> str | None:
    if signature.empty:
        return "there is nothing to compute"
    for dtype in signature.weights:
        if dtype != signature.dtype:
            return f"the kernel takes weights of the dtype of the tokens, {signature.dtype}, got {dtype}"
    return why_not_triton(signature.device, signature.dtype)


OP = Op("gau_projections", _signature)
OP.register(
    "triton",
    lazy("sma_modules.ops.gau_projections.launch", "gau_projections"),
    priority=10,
    applies=_why_not_triton,
    pays=why_not_interpreted,
)
OP.register("eager", eager.gau_projections)
OP.register("reference", reference.gau_projections, priority=90)
