"""Prompts are prefilled in chunks that a graph could hold, and the results are those of the parallel model."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

import sma
from sma.errors import StreamingError
from sma_models.inference import Decoder, Prefiller, prefill
from sma_models.inference.fixed_capacity import why_not_fixed
from sma_models.language_model import LanguageModel
from tests.inference.replayed import Replayed
from tests.inference.test_decoder import close, double, every_language_model, whole
from tests.models.tiny import inputs_of, tiny

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@every_language_model
@pytest.mark.usefixtures("replaying")
def test_replayed_chunks_are_the_parallel_model(name: str) -> None:
    model = double(name)
    prefiller = Prefiller(model, 7)
    for seed, batch, length in ((0, 2, 40), (1, 2, 35), (2, 1, 29)):
        tokens = inputs_of(model, batch=batch, length=length, seed=seed)
        read = prefiller.prefill(tokens[:, :-1])
        close(read.logits, whole(model, tokens)[:, -2])
        with torch.no_grad():
            close(model(tokens[:, -1:], read.state).logits[:, 0], whole(model, tokens)[:, -1])
    assert prefiller.captured
    assert not prefiller.uncaptured


@pytest.mark.usefixtures("replaying")
def test_states_are_values_and_routings_those_of_the_chunk() -> None:
    model = double()
    prefiller, tokens = Prefiller(model, 8), inputs_of(model, batch=1, length=48)
    chunks = tokens.unflatten(1, (-1, 8)).unbind(1)
    states: list[Any] = [model.initial_state(1)]
    active = []
    for chunk in chunks:
        out = prefiller.forward_chunk(chunk, states[-1])
        states.append(out.state)
        active.append({name: routing.active.clone() for name, routing in out.routings.items()})
    with torch.no_grad():
        routings = model(tokens).routings
        for i, chunk in enumerate(chunks):
            launched: Any = model(chunk, states[i]).state
            for one, other in zip(launched.tensors(), states[i + 1].tensors(), strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    for name, routing in routings.items():
        assert torch.equal(torch.cat([each[name] for each in active], 1), routing.active)


@every_language_model
@pytest.mark.usefixtures("replaying")
def test_parts_of_a_chunk_are_padded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sma_models.inference.captured_chunks.SMALLEST", 3)
    model = double(name)
    prefiller = Prefiller(model, 20)
    tokens = inputs_of(model, batch=1, length=40)
    for length in (
        19,
        1,
        2,
        3,
        4,
        12,
        13,
        2,
        1,
        5,
        12,
        18,
        1,
        40,
        27,
        33,
    ):  # each size before, at and after its capture
        states = model.initial_state(1)
        for chunk in tokens[:, :length].split(20, 1):
            out = prefiller.forward_chunk(chunk, states)
            states = out.state
        with torch.no_grad():
            expected = model(tokens[:, :length])
            close(model.logits(out.x), expected.logits[:, -out.x.shape[1] :])
            close(
                model(tokens[:, :1], states).logits,
                whole(model, torch.cat([tokens[:, :length], tokens[:, :1]], 1))[:, -1:],
            )
        for layer, routing in expected.routings.items():
            last = routing.map(lambda each, columns=out.x.shape[1]: each[:, -columns:])
            assert torch.equal(out.routings[layer].active, last.active)
            assert torch.equal(out.routings[layer].position, last.position)
    assert sorted(prefiller._partials) == [3, 12, 20]
    assert all(part.graph.ready for part in prefiller._partials.values())


@pytest.mark.usefixtures("replaying")
@pytest.mark.parametrize(
    ("chunk", "parts"), [(1, []), (2, [2]), (128, [128]), (129, [128]), (130, [128, 130]), (600, [128, 512, 600])]
)
def test_after_the_warm_up_no_chunk_is_captured(chunk: int, parts: list[int]) -> None:
    prefiller = Prefiller(tiny("seqboat_small_lm"), chunk)
    prefiller.warm_up()
    assert prefiller.captured
    assert sorted(prefiller._partials) == parts
    assert all(part.graph.ready for part in prefiller._partials.values())


def test_where_nothing_is_captured_there_is_no_warm_up() -> None:
    prefiller = Prefiller(tiny("seqboat_small_lm"), 8)
    prefiller.warm_up()
    assert not prefiller._wholes
    assert not prefiller._partials


@every_language_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_chunk_keeps_the_dtypes_of_a_state(name: str, dtype: torch.dtype) -> None:
    """What is put into the tensors of a graph is not rounded."""
    model = deepcopy(tiny(name)).to(dtype)
    before = model.initial_state(1)
    after = prefill(model, inputs_of(model, batch=1, length=20), before).state
    assert [each.dtype for each in before.tensors()] == [each.dtype for each in after.tensors()]


@pytest.mark.usefixtures("replaying")
def test_partial_and_padded_chunks_of_a_batch_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = double()
    prefiller, tokens = Prefiller(model, 8), inputs_of(model, batch=2, length=47)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    valid[0, :5] = False
    prefiller.prefill(tokens[:, :8], valid=valid[:, :8])
    prefiller.prefill(tokens[:, :7])
    assert not prefiller._wholes
    assert not prefiller._partials, "only those of single prompts are captured"
    close(prefiller.prefill(tokens, valid=valid).logits, prefill(model, tokens, valid=valid).logits)
    assert list(prefiller._wholes) == [2], "where the padding has ended chunks are whole"
    prefiller._wholes.clear()
    monkeypatch.setattr("sma_models.inference.prefiller.MAX_TOKENS", 15)
    prefiller.prefill(tokens)
    assert not prefiller._wholes
    prefiller.prefill(tokens[:1])
    assert list(prefiller._wholes) == [1]
    monkeypatch.setattr("sma_models.inference.prefiller._MAX_BATCH_SIZES", 1)
    monkeypatch.setattr("sma_models.inference.prefiller.MAX_TOKENS", 16)
    close(prefiller.prefill(tokens).logits, whole(model, tokens)[:, -1])
    assert list(prefiller._wholes) == [1]


@pytest.mark.usefixtures("replaying")
def test_a_state_that_does_not_fit_is_refused() -> None:
    model = double()
    prefiller, tokens = Prefiller(model, 8), inputs_of(model, batch=2, length=16)
    with pytest.raises(StreamingError, match="state: must be of 2 sequences like the input, got 1"):
        prefiller.prefill(tokens, model.initial_state(1))
    with pytest.raises(StreamingError, match="state: does not fit the model: "):
        prefiller.prefill(tokens, double("seqboat_lm").initial_state(2))
    close(prefiller.prefill(tokens).logits, whole(model, tokens)[:, -1])


@pytest.mark.usefixtures("replaying")
def test_the_reason_of_a_failed_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    model = double()
    prefiller, tokens = Prefiller(model, 8), inputs_of(model, batch=1, length=32)
    monkeypatch.setattr(Replayed, "failure", "operation not permitted when stream is capturing")
    prefiller.prefill(tokens)
    assert prefiller.uncaptured == {"": "operation not permitted when stream is capturing"}


def test_why_chunks_are_not_captured() -> None:
    model = tiny("seqboat_small_lm")
    assert Prefiller(model).uncaptured == {"": "a CUDA graph needs a CUDA device, the model is on cpu"}
    assert Prefiller(model, capture=False).uncaptured == {"": "capture is False"}
    decoder = Decoder(model, 1, prefill_chunk=3, capture=False)
    assert (decoder.prefiller.chunk, decoder.prefiller.captured) == (3, False)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    stock: Any = nn.Sequential(sma.SparselyActivated(encoder, causal=True).with_window(4))
    assert why_not_fixed(stock) == {
        "0": "TransformerEncoderLayer (layout 'padded') takes rows as long as the longest sequence of active tokens, "
        "which is not known beforehand"
    }


@needs_a_gpu
@every_language_model
def test_captured_chunks_are_the_launched_ones(name: str) -> None:
    model: LanguageModel = deepcopy(tiny(name)).cuda()
    tokens = inputs_of(model, batch=2, length=300).cuda()
    captured, launched = Prefiller(model, 32), Prefiller(model, 32, capture=False)
    first = captured.prefill(tokens)
    assert captured.captured, captured.uncaptured
    torch.testing.assert_close(first.logits, launched.prefill(tokens).logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(first.logits.cpu(), whole(tiny(name), tokens.cpu())[:, -1], rtol=0, atol=1e-4)
    # The first chunks of the first reading were launched, with the same shapes: the same bits.
    again = captured.prefill(tokens)
    assert torch.equal(first.logits, again.logits)
    assert all(map(torch.equal, first.state.tensors(), again.state.tensors()))
    assert not launched.captured


@needs_a_gpu
@every_language_model
def test_captured_parts_are_the_launched_ones(name: str) -> None:
    model: LanguageModel = deepcopy(tiny(name)).cuda()
    tokens = inputs_of(model, batch=1, length=300).cuda()
    captured, launched = Prefiller(model, 256), Prefiller(model, 256, capture=False)
    captured.warm_up()
    for length in (1, 100, 128, 129, 255, 300):
        read = captured.prefill(tokens[:, :length])
        torch.testing.assert_close(read.logits, launched.prefill(tokens[:, :length]).logits, rtol=0, atol=1e-4)
        again = captured.prefill(tokens[:, :length])
        assert torch.equal(read.logits, again.logits)
        assert all(map(torch.equal, read.state.tensors(), again.state.tensors()))
    assert not captured.uncaptured
    assert all(part.graph.ready for part in captured._partials.values())


@needs_a_gpu
def test_captured_chunks_do_not_synchronise() -> None:
    from sma.runtime.cuda_graphs import waiting_forbidden

    model: LanguageModel = deepcopy(tiny("seqboat_lm")).cuda()
    prefiller, tokens = Prefiller(model, 256), inputs_of(model, batch=1, length=256).cuda()
    state: Any = model.initial_state(1)
    prefiller.warm_up()
    with waiting_forbidden():
        for length in (256, 7, 130):
            state = prefiller.forward_chunk(tokens[:, :length], state).state
