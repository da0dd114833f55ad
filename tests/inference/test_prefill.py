"""Prompts are read in whole chunks that a graph could hold, and the results are those of the parallel model."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sma
from sma.errors import ConfigError, StreamingError
from sma_models.inference import Decoder, Reader, prefill
from sma_models.inference import decoder as decoder_module
from sma_models.inference.fixed_capacity import why_not_fixed
from sma_models.inference.graphs import WARMUP
from sma_models.inference.prefiller import Pass
from sma_models.language_model import LanguageModel
from tests.inference.test_decoder import close, double, every_language_model, whole
from tests.models.tiny import inputs_of, tiny

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor in something that a function returned."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        return [each for field in fields(value) for each in tensors_of(getattr(value, field.name))]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return [each for item in inside for each in tensors_of(item)]


class Replayed:
    """Does on a CPU what a graph does: from the capture on, results lie where those of the capture lay."""

    failure: str | None = None

    def __init__(self, device: torch.device) -> None:
        self.runs = 0
        self.returned: Any = None

    @property
    def ready(self) -> bool:
        return self.returned is not None

    def run(self, function: Callable[[], Any]) -> Any:
        self.runs += 1
        if self.runs <= WARMUP:
            return function()
        if self.returned is None:
            self.returned = function()
            for tensor in tensors_of(self.returned):  # while it is captured nothing runs
                tensor.zero_()
        with torch.no_grad():
            for place, tensor in zip(tensors_of(self.returned), tensors_of(function()), strict=True):
                assert place.shape == tensor.shape
                place.copy_(tensor)
        return self.returned


@pytest.fixture
def replaying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole chunks run as on a CUDA device."""
    monkeypatch.setattr("sma_models.inference.prefiller.Graph", Replayed)
    monkeypatch.setattr("sma_models.inference.prefiller._why_uncaptured", lambda model, capture: why_not_fixed(model))


@every_language_model
@pytest.mark.usefixtures("replaying")
def test_replayed_chunks_are_the_parallel_model(name: str) -> None:
    model = double(name)
    reader = Reader(model, 7)
    for seed, batch, length in ((0, 2, 40), (1, 2, 35), (2, 1, 29)):
        tokens = inputs_of(model, batch=batch, length=length, seed=seed)
        read = reader.read(tokens[:, :-1])
        close(read.logits, whole(model, tokens)[:, -2])
        with torch.no_grad():
            close(model(tokens[:, -1:], read.state).logits[:, 0], whole(model, tokens)[:, -1])
    assert reader.captured
    assert not reader.uncaptured


@pytest.mark.usefixtures("replaying")
def test_states_are_values_and_routings_those_of_the_chunk() -> None:
    model = double()
    reader, tokens = Reader(model, 8), inputs_of(model, batch=1, length=48)
    chunks = tokens.unflatten(1, (-1, 8)).unbind(1)
    states: list[Any] = [model.initial_state(1)]
    active = []
    for chunk in chunks:
        out = reader.read_chunk(chunk, states[-1])
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
def test_parts_of_a_chunk_are_filled_up(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sma_models.inference.prefiller._LEAST_COLUMNS", 3)
    model = double(name)
    reader = Reader(model, 20)
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
            out = reader.read_chunk(chunk, states)
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
    assert sorted(reader._parts) == [3, 12, 20]
    assert all(part.graph.ready for part in reader._parts.values())


@every_language_model
@pytest.mark.usefixtures("replaying")
def test_pieces_of_several_prompts_are_read_together(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sma_models.inference.prefiller._LEAST_COLUMNS", 2)
    model = double(name)
    reader, tokens = Reader(model, 9, together=3), inputs_of(model, batch=3, length=40)
    assert reader.passes == [Pass(2, 6), Pass(8, 3), Pass(9, 3)]
    states: list[Any] = [reader.beginning()] * 3
    at = [0, 0, 0]
    # Rows and lengths change from call to call, before the captures and after them.
    for rows, lengths in (
        ([0, 1, 2], [9, 4, 1]),
        ([2, 0], [9, 2]),
        ([1], [3]),
        ([1, 2, 0], [9, 2, 9]),
        ([0, 1], [1, 9]),
        ([2, 0, 1], [7, 8, 1]),
        ([0, 2], [2, 5]),
    ):
        pieces = [tokens[row : row + 1, at[row] : at[row] + length] for row, length in zip(rows, lengths, strict=True)]
        outs = reader.read_pieces(pieces, [states[row] for row in rows])
        for row, length, out in zip(rows, lengths, outs, strict=True):
            at[row] += length
            states[row] = out.state
            with torch.no_grad():
                expected = model(tokens[row : row + 1, : at[row]])
            close(model.logits(out.x), expected.logits[:, -length:])
            for layer, routing in expected.routings.items():
                assert torch.equal(out.routings[layer].active, routing.active[:, -length:])
                assert torch.equal(out.routings[layer].position, routing.position[:, -length:])
    for row, state in enumerate(states):
        assert {each.shape[0] for each in state.tensors()} == {1}
        with torch.no_grad():
            close(
                model(tokens[:1, :1], state).logits,
                model(torch.cat([tokens[row, : at[row]], tokens[0, :1]])[None]).logits[:, -1:],
            )
    assert all(each.graph.ready for each in reader._several.values())
    with pytest.raises(ConfigError, match="pieces: must be at most 3 of up to 8 tokens, got 4"):
        reader.read_pieces([tokens[:1, :1], *[tokens[:1, :5]] * 4], [reader.beginning()] * 5)
    with pytest.raises(StreamingError, match="state: must be of 1 sequences like the input, got 2"):
        reader.read_pieces([tokens[:1, :1]], [model.initial_state(2)])


def check_independence(model: LanguageModel, tokens: Tensor) -> None:
    """What a piece of ``tokens (14, 64)`` gives has the same bits whoever is read with it, in whatever place."""
    reader = Reader(model, 64, together=2)
    assert reader.passes == [Pass(4, 8), Pass(16, 4), Pass(64, 2)]
    reader.warm_up()
    lengths = [1, 2, 3, 4, 4, 3, 2, 1, 5, 9, 16, 16, 17, 64]
    pieces = [tokens[i : i + 1, :length] for i, length in enumerate(lengths)]

    def read(those: list[int]) -> dict[int, list[Tensor]]:
        outs = reader.read_pieces([pieces[i] for i in those], [reader.beginning()] * len(those))
        return {i: tensors_of((out.x.clone(), out.state)) for i, out in zip(those, outs, strict=True)}

    everyone = list(range(14))
    together = read(everyone)
    for others in (everyone[::-1], everyone[1::3], *([i] for i in everyone)):
        for i, found in read(others).items():
            assert all(map(torch.equal, found, together[i]))


@pytest.mark.usefixtures("replaying")
def test_what_a_prompt_gives_does_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sma_models.inference.prefiller._LEAST_COLUMNS", 4)
    model: LanguageModel = tiny("seqboat_lm")  # single precision: a bit would show
    check_independence(model, inputs_of(model, batch=14, length=64))


def test_together_only_where_a_graph_can_hold_it(replaying: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("seqboat_small_lm")
    assert Reader(model, 16_384, together=3).together == 1, "too many rows"
    assert Reader(model, 8, together=3).passes == [Pass(8, 3)]
    reader = Reader(model, 2048, together=4)
    assert reader.passes == [Pass(128, 16), Pass(512, 8), Pass(2048, 4)]
    assert [reader.pass_of(length).columns for length in (1, 128, 129, 512, 513, 2048)] == [128, 128, 512, 512] + [
        2048
    ] * 2
    monkeypatch.undo()
    assert Reader(model, 2048, together=3).passes == [Pass(2048, 1)], "nothing is captured"
    with pytest.raises(ConfigError, match="together: must be at least 1, got 0"):
        Reader(model, together=0)


@pytest.mark.usefixtures("replaying")
@pytest.mark.parametrize(
    ("chunk", "parts"), [(1, []), (2, [2]), (128, [128]), (129, [128]), (130, [128, 130]), (600, [128, 512, 600])]
)
def test_whoever_comes_after_the_warm_up_waits_for_no_capture(chunk: int, parts: list[int]) -> None:
    reader = Reader(tiny("seqboat_small_lm"), chunk)
    reader.warm_up()
    assert reader.captured
    assert sorted(reader._parts) == parts
    assert all(part.graph.ready for part in reader._parts.values())


@pytest.mark.usefixtures("replaying")
def test_nor_does_anyone_who_comes_with_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sma_models.inference.prefiller._LEAST_COLUMNS", 4)
    reader = Reader(tiny("seqboat_small_lm"), 20, together=2)
    reader.warm_up()
    assert list(reader._several) == reader.passes == [Pass(4, 4), Pass(16, 2), Pass(20, 2)]
    assert all(each.graph.ready for each in reader._several.values())


def test_where_nothing_is_captured_there_is_no_warm_up() -> None:
    reader = Reader(tiny("seqboat_small_lm"), 8)
    reader.warm_up()
    assert not reader._wholes
    assert not reader._parts


@every_language_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_chunk_keeps_the_dtypes_of_a_state(name: str, dtype: torch.dtype) -> None:
    """What is put into the tensors of a graph is not rounded."""
    model = deepcopy(tiny(name)).to(dtype)
    before = model.initial_state(1)
    after = prefill(model, inputs_of(model, batch=1, length=20), before).state
    assert [each.dtype for each in before.tensors()] == [each.dtype for each in after.tensors()]


@pytest.mark.usefixtures("replaying")
def test_what_is_no_whole_chunk_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = double()
    reader, tokens = Reader(model, 8), inputs_of(model, batch=2, length=47)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    valid[0, :5] = False
    reader.read(tokens[:, :8], valid=valid[:, :8])
    reader.read(tokens[:, :7])
    assert not reader._wholes
    assert not reader._parts, "only those of single prompts are captured"
    close(reader.read(tokens, valid=valid).logits, prefill(model, tokens, valid=valid).logits)
    assert list(reader._wholes) == [2], "where the padding has ended chunks are whole"
    reader._wholes.clear()
    monkeypatch.setattr("sma_models.inference.prefiller._MOST_TOKENS", 15)
    reader.read(tokens)
    assert not reader._wholes
    reader.read(tokens[:1])
    assert list(reader._wholes) == [1]
    monkeypatch.setattr("sma_models.inference.prefiller._MOST_GRAPHS", 1)
    monkeypatch.setattr("sma_models.inference.prefiller._MOST_TOKENS", 16)
    close(reader.read(tokens).logits, whole(model, tokens)[:, -1])
    assert list(reader._wholes) == [1]


@pytest.mark.usefixtures("replaying")
def test_a_state_that_does_not_fit_is_refused() -> None:
    model = double()
    reader, tokens = Reader(model, 8), inputs_of(model, batch=2, length=16)
    with pytest.raises(StreamingError, match="state: must be of 2 sequences like the input, got 1"):
        reader.read(tokens, model.initial_state(1))
    with pytest.raises(StreamingError, match="state: does not fit the model: "):
        reader.read(tokens, double("seqboat_lm").initial_state(2))
    close(reader.read(tokens).logits, whole(model, tokens)[:, -1])


@pytest.mark.usefixtures("replaying")
def test_a_failed_capture_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = double()
    reader, tokens = Reader(model, 8), inputs_of(model, batch=1, length=32)
    monkeypatch.setattr(Replayed, "failure", "operation not permitted when stream is capturing")
    reader.read(tokens)
    assert reader.uncaptured == {"": "operation not permitted when stream is capturing"}


def test_why_chunks_are_not_captured() -> None:
    model = tiny("seqboat_small_lm")
    assert Reader(model).uncaptured == {"": "a CUDA graph needs a CUDA device, the model is on cpu"}
    assert Reader(model, capture=False).uncaptured == {"": "capture is False"}
    decoder = Decoder(model, 1, prefill_chunk=3, capture=False)
    assert (decoder.reader.chunk, decoder.reader.captured) == (3, False)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    stock: Any = nn.Sequential(sma.SparselyActivated(encoder, causal=True).with_window(4))
    assert why_not_fixed(stock) == {
        "0": "TransformerEncoderLayer (layout 'padded') takes rows as long as the longest sequence of active tokens, "
        "which is not known beforehand"
    }


@every_language_model
def test_states_take_their_slots_by_a_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_module, "Graph", Replayed)
    model = double(name)
    decoder, tokens = Decoder(model, 2, rollback=1), inputs_of(model, batch=3, length=20)
    decoder._seat = decoder_module._Seat(decoder)
    kept = decoder.join(tokens[2, :4])
    for i, length in enumerate((3, 17, 9, 1, 12)):  # before the capture, at it and after it
        row = tokens[i % 3]
        slot = decoder.join(row[:length])
        close(decoder.logits[slot], whole(model, row[None, :length])[0, -1])
        close(decoder.step({slot: int(row[length])})[slot], whole(model, row[None, : length + 1])[0, -1])
        decoder.leave(slot)
    decoder.write(kept, prefill(model, tokens[:1, :6]).state)
    close(decoder.step({kept: int(tokens[0, 6])})[kept], whole(model, tokens[:1, :7])[0, -1])
    assert not decoder._seat.fits(prefill(model, tokens[:2]).state), "of two sequences"
    assert not decoder._seat.fits(model.initial_state(1).to(dtype=torch.float32)), "would be widened"


@needs_a_gpu
@every_language_model
def test_captured_chunks_are_the_launched_ones(name: str) -> None:
    model: LanguageModel = deepcopy(tiny(name)).cuda()
    tokens = inputs_of(model, batch=2, length=300).cuda()
    captured, launched = Reader(model, 32), Reader(model, 32, capture=False)
    first = captured.read(tokens)
    assert captured.captured, captured.uncaptured
    torch.testing.assert_close(first.logits, launched.read(tokens).logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(first.logits.cpu(), whole(tiny(name), tokens.cpu())[:, -1], rtol=0, atol=1e-4)
    # The first chunks of the first reading were launched, with the same shapes: the same bits.
    again = captured.read(tokens)
    assert torch.equal(first.logits, again.logits)
    assert all(map(torch.equal, first.state.tensors(), again.state.tensors()))
    assert not launched.captured


@needs_a_gpu
@every_language_model
def test_captured_parts_are_the_launched_ones(name: str) -> None:
    model: LanguageModel = deepcopy(tiny(name)).cuda()
    tokens = inputs_of(model, batch=1, length=300).cuda()
    captured, launched = Reader(model, 256), Reader(model, 256, capture=False)
    captured.warm_up()
    for length in (1, 100, 128, 129, 255, 300):
        read = captured.read(tokens[:, :length])
        torch.testing.assert_close(read.logits, launched.read(tokens[:, :length]).logits, rtol=0, atol=1e-4)
        again = captured.read(tokens[:, :length])
        assert torch.equal(read.logits, again.logits)
        assert all(map(torch.equal, read.state.tensors(), again.state.tensors()))
    assert not captured.uncaptured
    assert all(part.graph.ready for part in captured._parts.values())


@needs_a_gpu
@every_language_model
def test_captured_states_take_their_slots(name: str) -> None:
    model: LanguageModel = deepcopy(tiny(name)).cuda()
    tokens = inputs_of(model, batch=3, length=20).cuda()
    captured, launched = (Decoder(model, 8, capture=capture) for capture in (True, False))
    for i, length in enumerate((3, 17, 9, 1, 12)):
        read = prefill(model, tokens[i % 3 : i % 3 + 1, :length], capture=False)
        (slot,), (other,) = captured.resume(read.state, read.logits), launched.resume(read.state, read.logits)
        assert torch.equal(captured.logits[slot], launched.logits[other])
        mine, theirs = captured.read(slot), launched.read(other)
        assert all(map(torch.equal, mine.tensors(), theirs.tensors()))
    assert captured._seat is not None
    assert captured._seat._graph.ready
    assert launched._seat is None


def go_on_alike(reader: Reader, further: Tensor, one: Any, other: Any) -> None:
    """Whatever comes after two states gives the same, however each of them holds it.

    A truncated average, for one, keeps after a few tokens what it keeps summed anew after many.
    """
    mine, theirs = (reader.read_chunk(further, state) for state in (one, other))
    torch.testing.assert_close(mine.x, theirs.x, rtol=0, atol=1e-4)
    assert mine.routings.keys() == theirs.routings.keys()
    for name, routing in theirs.routings.items():
        assert torch.equal(mine.routings[name].active, routing.active)
        assert torch.equal(mine.routings[name].position, routing.position)
        torch.testing.assert_close(mine.routings[name].confidence, routing.confidence, rtol=0, atol=1e-4)


@needs_a_gpu
def test_captured_pieces_are_the_launched_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sma_models.inference.prefiller._LEAST_COLUMNS", 16)
    model: LanguageModel = deepcopy(tiny("seqboat_lm")).cuda()
    tokens = inputs_of(model, batch=10, length=200).cuda()
    further = inputs_of(model, batch=1, length=40, seed=1).cuda()
    captured, launched = Reader(model, 200, together=2), Reader(model, 200, capture=False)
    captured.warm_up()
    assert not captured.uncaptured
    assert captured.passes == [Pass(16, 6), Pass(64, 2), Pass(200, 2)]
    lengths = [1, 4, 16, 15, 2, 9, 17, 64, 65, 200]
    pieces = [tokens[i : i + 1, :length] for i, length in enumerate(lengths)]
    outs = captured.read_pieces(pieces, [captured.beginning()] * len(pieces))
    assert all(each.graph.ready for each in captured._several.values())
    for piece, out in zip(pieces, outs, strict=True):
        expected = launched.read_chunk(piece, launched.beginning())
        torch.testing.assert_close(out.x, expected.x, rtol=0, atol=1e-4)
        go_on_alike(launched, further, out.state, expected.state)
    for state in [out.state for out in outs]:
        assert state is not None
        (alone,) = captured.read_pieces([further], [state])
        torch.testing.assert_close(alone.x, launched.read_chunk(further, state).x, rtol=0, atol=1e-4)


@needs_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_captured_pieces_do_not_depend_on_the_others(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sma_models.inference.prefiller._LEAST_COLUMNS", 4)
    model: LanguageModel = tiny("seqboat_lm", d_model=96).to("cuda", dtype)
    check_independence(model, inputs_of(model, batch=14, length=64).cuda())


@needs_a_gpu
def test_captured_chunks_do_not_wait() -> None:
    from sma.runtime.cuda_graphs import waiting_forbidden

    model: LanguageModel = deepcopy(tiny("seqboat_lm")).cuda()
    reader, tokens = Reader(model, 256), inputs_of(model, batch=1, length=256).cuda()
    state: Any = model.initial_state(1)
    reader.warm_up()
    with waiting_forbidden():
        for length in (256, 7, 130):
            state = reader.read_chunk(tokens[:, :length], state).state
