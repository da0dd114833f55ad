"""A fixed capacity in a whole model."""

from __future__ import annotations

import torch

import sma


def test_the_model_reports_what_finds_no_room() -> None:
    sizes = ("d_model=32", "n_layers=2", "blocks[0].activate.configurator={type: always}")
    tokens = torch.randint(0, 256, (2, 20))
    valid = torch.arange(20) < torch.tensor([[20], [12]])
    model = sma.build("seqboat_text", *sizes, "blocks[0].activate.capacity=0.5").eval()
    routings = model(tokens, valid=valid).routings
    # Room for 20 of the 32 real tokens, in each layer.
    assert [int(routing.overflow) for routing in routings.values()] == [12, 12]
    assert [int(routing.active.sum()) for routing in routings.values()] == [20, 20]
    assert all(r.overflow is None for r in sma.build("seqboat_text", *sizes)(tokens).routings.values())
