"""What :func:`~sma_modules.ops.expert_routing.choose_experts` gives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ChosenExperts(NamedTuple):
    """Which experts T tokens go to, and what the losses of a router need.

    Attributes:
        expert: ``(T, k)`` int64, the most probable experts, best first.
        weight: ``(T, k)``: their probabilities, or these divided by their sum.
        probability: ``(E,)``: the mean probability of each expert; 0 without tokens.
        square: the mean of ``logsumexp(logits)^2``; 0 without tokens.
    """

    expert: Tensor
    weight: Tensor
    probability: Tensor
    square: Tensor


class Signature(NamedTuple):
    """What the choice of a backend depends on."""

    device: torch.device
    dtype: torch.dtype
    experts: int
