"""What a gated attention unit works on, from its one projection: SiLU, two affine maps and rotary positions at once."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op, without_autocast
from sma.ops.kernel import why_not_triton_on
from sma_modules.ops.gau_inputs.eager import gau_inputs_eager
from sma_modules.ops.gau_inputs.reference import gau_inputs_reference

__all__ = ["OP", "gau_inputs"]

OP = Op("gau_inputs")

MAXIMUM_Z = 1024
"""Widest Z of the kernel, which holds whole rows of it."""


def _why_not_triton(mx: Tensor, gamma: Tensor, beta: Tensor, position: Tensor | None, theta: float) -> str | None:
    if gamma.shape[1] > MAXIMUM_Z:
        return f"the kernel takes a Z of at most {MAXIMUM_Z} features, got {gamma.shape[1]}"
    return why_not_triton_on(mx)


@OP.backend("triton", priority=10, applies=_why_not_triton)
def _triton(
    mx: Tensor, gamma: Tensor, beta: Tensor, position: Tensor | None, theta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sma_modules.ops.gau_inputs.launch import gau_inputs_triton

    return gau_inputs_triton(mx, gamma, beta, position, theta)


OP.backend("eager", priority=50)(gau_inputs_eager)
OP.backend("reference", priority=90)(gau_inputs_reference)


def gau_inputs(
    mx: Float[Tensor, "tokens width"],
    gamma: Float[Tensor, "2 z"],
    beta: Float[Tensor, "2 z"],
    *,
    position: Int[Tensor, " tokens"] | None = None,
    theta: float = 10000.0,
) -> tuple[Float[Tensor, "tokens z"], Float[Tensor, "tokens z"], Float[Tensor, "tokens h"], Float[Tensor, "tokens h"]]:
    """Queries, keys, values and gate of a gated attention unit (SeqBoat, arXiv 2306.11197, section 4).

    ``[Z | R | V] = SiLU(mx)``, ``q = rotary(Z * gamma[0] + beta[0])``, ``k = rotary(Z * gamma[1] + beta[1])``, where
    rotary turns the pair of features (2i, 2i + 1) by ``position * theta ** (-2 i / z)`` radians. Angles are computed in
    float64 where the device has it, the rest in float32 at least.

    Args:
        mx: ``(K, z + 2h)``.
        gamma: ``(2, z)``, of any floating-point dtype.
        beta: ``(2, z)``.
        position: ``(K,)`` int64 original positions; None for no rotation.
        theta: the base of the wavelengths.

    Returns:
        q ``(K, z)``, k ``(K, z)``, v ``(K, h)`` and r ``(K, h)`` in the dtype of ``mx``.

    Raises:
        ShapeError: sizes do not fit, or z is odd and positions are given.

    Example:
        >>> import torch
        >>> q, k, v, r = gau_inputs(torch.randn(5, 4 + 2 * 3), torch.ones(2, 4), torch.zeros(2, 4))
        >>> q.shape, v.shape
        (torch.Size([5, 4]), torch.Size([5, 3]))
    """
    if gamma.dim() != 2 or gamma.shape[0] != 2 or beta.shape != gamma.shape:
        raise ShapeError(f"gau_inputs: gamma and beta must be (2, z), got {tuple(gamma.shape)} and {tuple(beta.shape)}")
    z = gamma.shape[1]
    if mx.dim() != 2 or mx.shape[1] < z or (mx.shape[1] - z) % 2:
        raise ShapeError(f"gau_inputs: mx must be (K, {z} + 2h), got {tuple(mx.shape)}")
    if position is not None and position.shape != mx.shape[:1]:
        raise ShapeError(f"gau_inputs: position must be ({mx.shape[0]},), got {tuple(position.shape)}")
    if position is not None and z % 2:
        raise ShapeError(f"gau_inputs: z must be even for rotary positions, got {z}")
    with without_autocast(mx.device):
        q, k, v, r = OP(mx, gamma, beta, position, theta)
    return q, k, v, r
