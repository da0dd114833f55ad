"""Routing: the frozen decision of a layer, which tokens activate which modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from sma.errors import RoutingError
from sma.ops.packed import Packed

__all__ = ["Packed", "Routing"]


@dataclass(frozen=True)
class Routing:
    """Which tokens are active, and with which confidence, in one sparsely activated layer.

    Attributes:
        active: ``(B, L, M)`` bool: module m runs on token (b, t). Never True at padding.
        confidence: ``(B, L, M)``: weight of the module's output; carries the gradient to the configurator. Only read
            where active.
        valid: ``(B, L)`` bool: real tokens.
        position: ``(B, L)`` int64: 0-based position among the real tokens of the stream.
        overflow: ``(M,)`` int64: active tokens that were dropped for lack of capacity; None without a fixed capacity.
    """

    active: Tensor
    confidence: Tensor
    valid: Tensor
    position: Tensor
    overflow: Tensor | None = None

    def __post_init__(self) -> None:
        if self.active.dim() != 3 or self.active.dtype != torch.bool:
            raise RoutingError(
                f"Routing.active: must be a bool tensor (B, L, M), got {self.active.dtype} {tuple(self.active.shape)}"
            )
        if self.confidence.shape != self.active.shape or self.valid.shape != self.active.shape[:2]:
            raise RoutingError(
                f"Routing: active {tuple(self.active.shape)}, confidence {tuple(self.confidence.shape)} and valid "
                f"{tuple(self.valid.shape)} must agree on (B, L, M)"
            )

    @property
    def n_modules(self) -> int:
        """Number of modules M."""
        return self.active.shape[-1]

    @cached_property
    def packed(self) -> tuple[Packed, ...]:
        """The packed view of each module."""
        return tuple(Packed.from_mask(self.active[..., m], self.position) for m in range(self.n_modules))

    def rate(self) -> Tensor:
        """``(B, M)`` float: share of each sequence's real tokens that activate each module; 0 for an empty sequence."""
        count = self.valid.sum(1, keepdim=True).clamp(min=1)
        return self.active.sum(1) / count

    def map(self, change: Callable[[Tensor], Tensor]) -> Routing:
        """The same for other tokens: with ``change`` applied to each tensor ``(B, L, ...)``."""
        active, confidence, valid, position = map(change, (self.active, self.confidence, self.valid, self.position))
        return replace(self, active=active, confidence=confidence, valid=valid, position=position)

    def detach(self) -> Routing:
        """The same decision, cut from the autograd graph, for keeping or replaying."""
        return replace(self, confidence=self.confidence.detach())
