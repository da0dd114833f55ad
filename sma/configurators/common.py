"""What several configurators share."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is when wider: decisions are never taken in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def top_of_sequence(score: Tensor, valid: Tensor, rate: float) -> Tensor:
    """The ``ceil(rate * n)`` highest scores of each sequence of n real tokens; ties go to the earlier token.

    Args:
        score: ``(B, L, M)``.
        valid: ``(B, L)`` real tokens.
        rate: share of the tokens.

    Returns:
        ``(B, L, M)`` bool.
    """
    masked = score.detach().masked_fill(~valid[..., None], float("-inf"))
    order = masked.sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(score.shape[1], device=score.device)[None, :, None].expand_as(order)
    )
    # The tolerance keeps 0.1 * 30 at 3 tokens.
    quota = (valid.sum(1).double() * rate - 1e-9).ceil().long()
    return rank < quota[:, None, None]
