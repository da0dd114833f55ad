"""Routings made up for the reports: pseudo-random decisions over given bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sma.routing import Routing

MakeRoutings = Callable[..., dict[str, Routing]]


@pytest.fixture
def make_routings() -> MakeRoutings:
    """``make(length, n_layers=3, n_modules=1, batch=1, padding=0)``: padding columns on the left of every row."""

    def make(
        length: int, n_layers: int = 3, n_modules: int = 1, batch: int = 1, padding: int = 0, seed: int = 0
    ) -> dict[str, Routing]:
        generator = torch.Generator().manual_seed(seed)
        valid = (torch.arange(length + padding) >= padding).expand(batch, -1)
        position = (valid.cumsum(1) - 1).clamp(min=0)
        routings = {}
        for i in range(n_layers):
            confidence = torch.rand(batch, length + padding, n_modules, generator=generator)
            active = (confidence > 0.5) & valid[..., None]
            routings[f"layers.{i}.activate"] = Routing(active, confidence, valid, position)
        return routings

    return make
