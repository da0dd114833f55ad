"""The definition: one token at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from sma_modules.ops.gau_inputs.types import Affine


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def _turned(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """``x (z,)`` with each pair of features turned."""
    pairs = []
    for i in range(x.numel() // 2):
        angle = position.double() * theta ** (-2 * i / x.numel())
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        even, odd = x[2 * i], x[2 * i + 1]
        pairs += [even * cos - odd * sin, even * sin + odd * cos]
    return torch.stack(pairs) if pairs else x


def gau_inputs(mx: Tensor, affine: Affine) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One token at a time, in float32 at least."""
    gamma, beta, position, theta = affine
    wide = torch.promote_types(torch.promote_types(mx.dtype, gamma.dtype), torch.float32)
    z = gamma.shape[1]
    h = (mx.shape[1] - z) // 2
    rows = []
    for t in range(mx.shape[0]):
        activated = _silu(mx[t].to(wide))
        both = [activated[:z] * gamma[n].to(wide) + beta[n].to(wide) for n in (0, 1)]
        if position is not None:
            both = [_turned(x, position[t], theta) for x in both]
        rows.append(torch.cat([*both, activated[z + h :], activated[z : z + h]]).to(mx.dtype))
    # The sum over nothing keeps the autograd graph where there are no tokens.
    graph = mx[:0].sum() + (gamma[:0].sum() + beta[:0].sum()).to(mx.dtype)
    out = torch.stack([*rows, mx.new_zeros(2 * z + 2 * h)])[:-1] + graph
    q, k, v, r = out.split_with_sizes([z, z, h, h], dim=1)
    return q, k, v, r
