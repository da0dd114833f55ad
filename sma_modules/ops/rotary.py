"""Rotary positions (RoFormer, arXiv 2104.09864) of packed tokens."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sma.errors import ShapeError


def rotary(
    x: Float[Tensor, "tokens heads z"], position: Int[Tensor, " tokens"], theta: float = 10000.0
) -> Float[Tensor, "tokens heads z"]:
    """Turn the feature pairs (2i, 2i + 1) of every token by ``position * theta ** (-2 i / z)`` radians.

    The product of a rotated query and a rotated key depends on the difference of their positions only.

    Args:
        x: ``(K, H, z)`` with an even z.
        position: ``(K,)`` int64.
        theta: the base of the wavelengths.

    Returns:
        ``(K, H, z)`` in the dtype of ``x``; computed in float32 at least, the angles in float64 where the device has
        it, so that they stay exact however long the stream.

    Raises:
        ShapeError: the width is odd, or there is not one position per token.

    Example:
        >>> rotary(torch.tensor([[[1.0, 0.0]]]), torch.tensor([0])).tolist()
        [[[1.0, 0.0]]]
    """
    if x.dim() != 3 or x.shape[-1] % 2:
        raise ShapeError(f"rotary: x must be (K, H, z) with an even z, got {tuple(x.shape)}")
    if position.shape != x.shape[:1]:
        raise ShapeError(f"rotary: position must be ({x.shape[0]},), got {tuple(position.shape)}")
    wide = x if x.dtype == torch.float64 else x.float()
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    power = torch.arange(0, x.shape[-1], 2, device=x.device, dtype=exact) / x.shape[-1]
    angle = position.to(exact)[:, None] * theta**-power
    cos, sin = angle.cos().to(wide.dtype)[:, None], angle.sin().to(wide.dtype)[:, None]
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # one pass over pairs instead of six over halves
        pairs = torch.view_as_complex(wide.contiguous().view(*x.shape[:2], x.shape[2] // 2, 2))
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)
    even, odd = wide[..., 0::2], wide[..., 1::2]
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)
