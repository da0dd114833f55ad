"""A state is written into a slot by a CUDA graph, with the same result."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from sma_models.inference import Decoder, prefill
from sma_models.inference.captured_slot_write import CapturedSlotWrite
from sma_models.language_model import LanguageModel
from tests.inference.replayed import Replayed
from tests.inference.test_decoder import close, double, every_language_model, whole
from tests.models.tiny import inputs_of, tiny

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@every_language_model
def test_a_slot_write_as_a_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sma_models.inference.captured_slot_write.CapturedFunction", Replayed)
    model = double(name)
    decoder, tokens = Decoder(model, 2, rollback=1), inputs_of(model, batch=3, length=20)
    decoder._slot_write = CapturedSlotWrite(model, decoder.logits)
    kept = decoder.join(tokens[2, :4])
    for i, length in enumerate((3, 17, 9, 1, 12)):  # before the capture, at it and after it
        row = tokens[i % 3]
        slot = decoder.join(row[:length])
        close(decoder.logits[slot], whole(model, row[None, :length])[0, -1])
        close(decoder.step({slot: int(row[length])})[slot], whole(model, row[None, : length + 1])[0, -1])
        decoder.leave(slot)
    decoder.write(kept, prefill(model, tokens[:1, :6]).state)
    close(decoder.step({kept: int(tokens[0, 6])})[kept], whole(model, tokens[:1, :7])[0, -1])
    assert not decoder._slot_write.fits(prefill(model, tokens[:2]).state), "of two sequences"
    assert not decoder._slot_write.fits(model.initial_state(1).to(dtype=torch.float32)), "would be widened"


@needs_a_gpu
@every_language_model
def test_captured_slot_writes_are_the_launched_ones(name: str) -> None:
    model: LanguageModel = deepcopy(tiny(name)).cuda()
    tokens = inputs_of(model, batch=3, length=20).cuda()
    captured, launched = (Decoder(model, 8, capture=capture) for capture in (True, False))
    for i, length in enumerate((3, 17, 9, 1, 12)):
        read = prefill(model, tokens[i % 3 : i % 3 + 1, :length], capture=False)
        (slot,), (other,) = captured.resume(read.state, read.logits), launched.resume(read.state, read.logits)
        assert torch.equal(captured.logits[slot], launched.logits[other])
        mine, theirs = captured.read(slot), launched.read(other)
        assert all(map(torch.equal, mine.tensors(), theirs.tensors()))
    assert captured._slot_write is not None
    assert captured._slot_write.graph.ready
    assert launched._slot_write is None
