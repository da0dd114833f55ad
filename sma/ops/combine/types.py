"""What :func:`~sma.ops.combine.combine` adds up, and how."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sma.ops.row_norm import RowNorm

Activation = Literal["none", "silu"]


class Terms(NamedTuple):
    """What the rows of a module are combined with.

    Attributes:
        weight: ``(B, L)`` confidence, read at active tokens; None means 1.
        skip: ``(B, L, D)`` or None.
        skip_bias: ``(D,)``, added to the skip of every token; None means 0.
        residual: ``(B, L, D)`` or None.
    """

    weight: Tensor | None = None
    skip: Tensor | None = None
    skip_bias: Tensor | None = None
    residual: Tensor | None = None


class Finish(NamedTuple):
    """What happens to the sum.

    Attributes:
        activation: after the residual was added.
        norm: normalisation over the features, or None.
        dropout: probability.
        drop_sum: drop out module and skip together, not the module alone.
    """

    activation: Activation = "none"
    norm: RowNorm | None = None
    dropout: float = 0.0
    drop_sum: bool = False


class Signature(NamedTuple):
    """What the choice of a backend depends on; ``empty`` says that there is nothing to compute."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    width: int
    empty: bool


def leading(h: Tensor, terms: Terms) -> Tensor:
    """The tensor whose dtype the result has."""
    return terms.residual if terms.residual is not None else terms.skip if terms.skip is not None else h
