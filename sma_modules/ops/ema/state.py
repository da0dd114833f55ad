"""The state of a causal average: a bounded number of values, whatever the length of the stream."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sma.state import State


@dataclass(frozen=True)
class EMAState(State):
    """State after the last real token of each row, float32 (float64 for float64 inputs) but for the inputs kept.

    Without truncation there is only ``hidden``. With truncation K a token leaves the window K steps after it came, so
    the last K inputs are kept; ``fresh`` and ``count`` bound the rounding error of taking tokens out of ``hidden``
    (README.md, "Streaming").

    Attributes:
        hidden: ``(B, D, N)``: S_t, with truncation over the last K tokens.
        fresh: ``(B, D, N)``: S over the last ``count`` tokens.
        count: ``(B,)`` int64 in 0..K-1: tokens in ``fresh``.
        history: ``(B, K, D)``: the last K inputs, newest last, zeros before the beginning of the stream; in their own
            dtype, which loses nothing.
    """

    hidden: Tensor
    fresh: Tensor | None = None
    count: Tensor | None = None
    history: Tensor | None = None

    @property
    def truncation(self) -> int | None:
        """K, or None."""
        return None if self.history is None else self.history.shape[1]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that the average of ``x`` is computed and remembered in."""
    return torch.promote_types(x.dtype, torch.float32)


def with_history_of(state: EMAState, x: Tensor, before: EMAState | None) -> EMAState:
    """``state`` with its inputs in the dtype of ``x``, or in a wider one in which some were kept ``before``."""
    if state.history is None:
        return state
    kept = x.dtype if before is None or before.history is None else before.history.dtype
    return replace(state, history=state.history.to(torch.promote_types(x.dtype, kept)))


def initial_state(batch: int, dim: int, n_state: int, truncation: int | None, *, like: Tensor) -> EMAState:
    """State before the first token, on the device of ``like``, for inputs in its dtype."""
    dtype = compute_dtype(like)
    hidden = torch.zeros(batch, dim, n_state, dtype=dtype, device=like.device)
    if truncation is None:
        return EMAState(hidden)
    return EMAState(
        hidden,
        fresh=torch.zeros_like(hidden),
        count=torch.zeros(batch, dtype=torch.int64, device=like.device),
        history=torch.zeros(batch, truncation, dim, dtype=like.dtype, device=like.device),
    )
