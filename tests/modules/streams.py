"""What the tests of modules that stream share."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from sma import Module, Packed, State


def chunks(mask: Tensor, cuts: list[int]) -> Iterator[tuple[Packed, Tensor]]:
    """Packed chunks of ``mask (B, L)`` between the cuts, and which of the packed rows of the whole they are."""
    length = mask.shape[1]
    edges = [0, *sorted(cuts), length]
    rows = torch.full(mask.shape, -1).masked_scatter(mask, torch.arange(int(mask.sum())))
    position = torch.arange(length).expand_as(mask)
    for start, end in pairwise(edges):
        part = mask[:, start:end]
        yield Packed.from_mask(part, position[:, start:end]), rows[:, start:end][part]


def stream(
    module: Module, x: Tensor, mask: Tensor, cuts: list[int], state: State | None = None
) -> tuple[Tensor, State]:
    """Run ``module`` chunk by chunk over ``x (K, D)``, the tokens of ``mask``; output ``(K, D)`` and the last state."""
    y = torch.full_like(x, float("nan"))
    state = module.initial_state(mask.shape[0], x) if state is None else state
    for packed, rows in chunks(mask, cuts):
        out, state, _ = module(x[rows], packed, state)
        y[rows] = out
    assert state is not None
    return y, state
