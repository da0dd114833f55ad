"""gau_inputs: SiLU, two affine maps and rotary positions at once; checks, and the choice of a backend."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op, lazy
from sma.ops.kernel import why_not_interpreted, why_not_triton
from sma_modules.ops.gau_inputs import eager, reference
from sma_modules.ops.gau_inputs.types import Affine, Signature

MAXIMUM_Z = 1024
"""Widest Z of the kernel, which holds whole rows of it."""


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
    affine = Affine(gamma, beta, position, theta)
    return OP.run(_signature(mx, affine), mx, affine)  # type: ignore[no-any-return]


def _signature(mx: Tensor, affine: Affine) -> Signature:
    return Signature(mx.device, mx.dtype, affine.gamma.shape[1])


def _why_not_triton(signature: Signature) -> str | None:
    if signature.z > MAXIMUM_Z:
        return f"the kernel takes a Z of at most {MAXIMUM_Z} features, got {signature.z}"
    return why_not_triton(signature.device, signature.dtype)


OP = Op("gau_inputs", _signature)
OP.register(
    "triton",
    lazy("sma_modules.ops.gau_inputs.launch", "gau_inputs"),
    priority=10,
    applies=_why_not_triton,
    pays=why_not_interpreted,
)
OP.register("eager", eager.gau_inputs)
OP.register("reference", reference.gau_inputs, priority=90)
