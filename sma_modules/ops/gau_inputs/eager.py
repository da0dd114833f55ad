"""Vectorised PyTorch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from sma_modules.ops.rotary import rotary


def gau_inputs_eager(
    mx: Tensor, gamma: Tensor, beta: Tensor, position: Tensor | None, theta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The default backend."""
    z = gamma.shape[1]
    h = (mx.shape[1] - z) // 2
    shared, r, v = F.silu(mx).split_with_sizes([z, h, h], dim=-1)
    q, k = queries_and_keys(shared, gamma, beta, position, theta)
    return q, k, v, r


def queries_and_keys(
    shared: Tensor, gamma: Tensor, beta: Tensor, position: Tensor | None, theta: float
) -> tuple[Tensor, Tensor]:
    """Queries and keys ``(K, z)`` each from their common ``shared (K, z)``, see the operation."""
    both = (shared[:, None] * gamma + beta).to(shared.dtype)
    if position is not None:
        both = rotary(both, position, theta)
    q, k = both.unbind(1)
    return q, k
