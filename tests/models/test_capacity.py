"""A fixed capacity in a whole model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sma
from sma.layer import SparseMixture
from sma_models.language_model import LanguageModel
from sma_models.stack import StackState
from tests.models.tiny import SPECS, inputs_of, tiny


def test_the_model_reports_what_finds_no_room() -> None:
    sizes = ("d_model=32", "n_layers=2", "blocks[0].activate.configurator={type: always}")
    tokens = torch.randint(0, 256, (2, 20))
    valid = torch.arange(20) < torch.tensor([[20], [12]])
    model = sma.build("seqboat_text", *sizes, "blocks[0].activate.capacity=0.5").eval()
    routings = model(tokens, valid=valid).routings
    # A capacity of 20 for the 32 real tokens, in each layer.
    assert [int(routing.overflow) for routing in routings.values()] == [12, 12]
    assert [int(routing.active.sum()) for routing in routings.values()] == [20, 20]
    assert all(r.overflow is None for r in sma.build("seqboat_text", *sizes)(tokens).routings.values())


def streamed(model: LanguageModel) -> tuple[list[Tensor], StackState]:
    """Logits at real tokens, and the state after chunks of rows of different lengths, some of them empty."""
    tokens, state, logits = inputs_of(model, 3, 44), model.initial_state(3), []
    for first, last in ((0, 20), (20, 40), (40, 43), (43, 44)):
        lengths = torch.tensor([last - first, (last - first) // 2, 0])
        with torch.no_grad():
            out = model(tokens[:, first:last], state, lengths=lengths)
        assert out.state is not None
        state = out.state
        logits += [out.logits[row, :length] for row, length in enumerate(lengths)]
    return logits, state


@pytest.mark.parametrize("name", [name for name in SPECS if name.endswith("_lm")])
def test_a_stream_in_fixed_shapes_is_the_stream(name: str) -> None:
    model: LanguageModel = tiny(name).double()
    logits, state = streamed(model)
    for layer in model.modules():
        if isinstance(layer, SparseMixture):
            layer.capacity, layer.capacity_streams = 1.0, True
    again, after = streamed(model)
    for ours, theirs in zip([*again, *after.tensors()], [*logits, *state.tensors()], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
