"""The engine generates what the library generates, every request gets a turn, and a cancelled one leaves nothing."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import sma
from sma.errors import ConfigError
from sma_models.inference.engine import _STEPS_BEFORE_PARTIAL_PASS, _STEPS_WITH_QUEUE, Engine
from sma_models.inference.limits import EngineLimits
from sma_models.inference.messages import (
    EngineFull,
    EngineStopped,
    Event,
    PromptPrefilled,
    SequenceFinished,
    TokenActivations,
    TokenGenerated,
)
from sma_models.language_model import LanguageModel
from tests.inference.engines import SMALL, ask, byte_model, continued, rounds, tokens_of, until
from tests.models.tiny import SPECS, tiny

PROMPTS = [b"a", b"def ", b"\xff\x00\n", b"import this, and then some more of it " * 3, bytes(range(64))]


@pytest.fixture
def engine(model: LanguageModel) -> Engine:
    return Engine(model, SMALL)


def free(engine: Engine) -> bool:
    """Nothing of any request is left."""
    kept = engine._busy or engine._unfinished or engine._events or engine._inbox
    return engine.in_flight == 0 and engine._decoder.free == engine.limits.slots and not kept


@pytest.mark.parametrize("name", [name for name in SPECS if name.endswith("_lm")])
def test_greedy_texts_are_those_of_generate(name: str) -> None:
    model = byte_model(name)
    engine = Engine(model, SMALL)
    asked = [ask(engine, prompt, 11 + i) for i, prompt in enumerate(PROMPTS * 2)]
    rounds(engine)
    for i, (prompt, each) in enumerate(zip(PROMPTS * 2, asked, strict=True)):
        assert each.written() == continued(model, prompt, 11 + i)
        assert each.events[-1] == SequenceFinished(0, "length")
    assert len({byte for each in asked for byte in each.written()}) > 1, "texts that say something"
    assert free(engine)


def test_giving_up_a_slot_changes_no_bit() -> None:
    model: LanguageModel = tiny(
        "seqboat_small_lm", vocab_size=256, tie_embeddings=False
    )  # single precision: a bit would show
    told: list[list[Any]] = []
    for quantum in (3, 1000):
        engine = Engine(model, EngineLimits(slots=2, quantum=quantum, prefill_chunk=16))
        asked = [ask(engine, bytes([65 + i] * 9), 40, likelihoods=2) for i in range(2)]
        if quantum == 3:  # others wait, so that everyone has to
            for i in range(4):
                ask(engine, bytes([97 + i]), 40)
        rounds(engine)
        told.append([each.events for each in asked])
    assert told[0] == told[1]


def test_a_long_prompt_does_not_stall_the_others(engine: Engine) -> None:
    writing = ask(engine, b"first", 60)
    engine.round()
    long = ask(engine, b"x" * 50 * SMALL.prefill_chunk, 1)
    engine.round()
    short = ask(engine, b"y" * 20, 5)
    before, count = len(writing.written()), 0
    while not short.finished:
        engine.round()
        count += 1
    assert count <= 8  # two chunks of its own, two of the long one, five tokens
    assert len(writing.written()) - before == count  # a token in every round
    assert not long.written()
    rounds(engine)
    assert long.finished == writing.finished == 1


def test_everyone_gets_a_turn(engine: Engine) -> None:
    asked = [ask(engine, bytes([i + 1] * 3), 40) for i in range(40)]
    while not all(each.written() for each in asked):
        engine.round()
        assert not any(each.finished for each in asked)  # the last one begins before the first one ends
    while not any(each.finished for each in asked):
        lengths = [len(each.written()) for each in asked]
        assert max(lengths) - min(lengths) <= 2 * SMALL.quantum
        engine.round()
    rounds(engine)
    assert all(each.finished == 1 and len(each.written()) == 40 for each in asked)


def test_what_is_drawn_depends_on_the_own_seed_only(engine: Engine, model: LanguageModel) -> None:
    alone = ask(engine, b"text", 20, n=3, temperature=1.0)
    rounds(engine)
    others = [ask(engine, bytes([i]), 20, temperature=1.0) for i in range(5)]
    again = ask(engine, b"text", 20, n=3, temperature=1.0)
    rounds(engine)
    assert [alone.written(i) for i in range(3)] == [again.written(i) for i in range(3)]
    assert len({alone.written(i) for i in range(3)}) == 3
    assert all(each.finished for each in others)


def test_likelihoods_are_those_of_the_model(engine: Engine, model: LanguageModel) -> None:
    prompt = b"some words, more than one piece of them"
    asked = ask(engine, prompt, 6, likelihoods=3, prompt_likelihoods=True)
    rounds(engine)
    text = prompt + asked.written()
    with torch.no_grad():
        log = torch.log_softmax(model(tokens_of(text)).logits[0], -1)
    told = [each for e in asked.events if isinstance(e, PromptPrefilled) for each in e.likelihoods]
    told += [e.likelihood for e in asked.events if isinstance(e, TokenGenerated)]
    assert len(told) == len(text)
    assert told[0] is None
    for position, likelihood in enumerate(told[1:], 1):
        assert likelihood is not None
        assert likelihood.own == pytest.approx(float(log[position - 1, text[position]]), abs=1e-9)
        best = log[position - 1].topk(3)
        assert [token for token, _ in likelihood.top] == best.indices.tolist()
        assert [value for _, value in likelihood.top] == pytest.approx(best.values.tolist(), abs=1e-9)


def test_activations_are_those_of_the_model(engine: Engine, model: LanguageModel) -> None:
    prompt = b"some words, more than one piece of them"
    ask(engine, b"somebody else", 9)
    asked = ask(engine, prompt, 9, activations=True)
    rounds(engine)
    text = prompt + asked.written()
    with torch.no_grad():
        routings = model(tokens_of(text)).routings
    told = [e for e in asked.events if isinstance(e, TokenActivations)]
    assert [(e.position, e.token) for e in told] == list(enumerate(text))  # the last one too
    assert engine.channels == list(routings)
    for layer, routing in enumerate(routings.values()):
        assert [e.active[layer] for e in told] == routing.active[0, :, 0].tolist()
        assert [e.confidence[layer] for e in told] == pytest.approx(routing.confidence[0, :, 0].tolist(), abs=6e-4)
    assert {e.active for e in told} > {told[0].active}, "some are active and some are not"
    assert isinstance(asked.events[-1], SequenceFinished)


def test_layers_of_several_modules_have_a_channel_for_each() -> None:
    experts = [{"type": "ffn", "d_hidden": 4}, {"type": "ffn", "d_hidden": 6}]
    mixture = {"configurator": {"type": "sigmoid"}, "modules": experts}
    block = {"type": "hybrid", "sublayers": [{"mixer": {"type": "ema", "n_state": 2}}, {"mixture": mixture}]}
    spec = {"type": "language_model", "vocab_size": 256, "d_model": 8, "n_layers": 2, "blocks": [block]}
    engine = Engine(sma.build(spec).eval(), SMALL)
    asked = ask(engine, b"abc", 2, activations=True)
    rounds(engine)
    assert engine.channels == [f"layers.{i}.sublayers.1.mixture[{m}]" for i in (0, 1) for m in (0, 1)]
    told = [e for e in asked.events if isinstance(e, TokenActivations)]
    assert len(told) == 5
    assert all(len(e.active) == len(e.confidence) == len(engine.channels) for e in told)


def test_a_model_that_decides_nothing_has_no_channels() -> None:
    engine = Engine(byte_model("mega_lm"), SMALL)
    asked = ask(engine, b"abc", 2, activations=True)
    rounds(engine)
    told = [e for e in asked.events if isinstance(e, TokenActivations)]
    assert [(e.position, e.active) for e in told] == [(position, ()) for position in range(5)]
    assert engine.channels == []


def test_stops_end_a_text(engine: Engine, model: LanguageModel) -> None:
    free_text = continued(model, b"def ", 30)
    stop = free_text[10:12]
    asked = ask(engine, b"def ", 30, stops=(b"never there", stop))
    rounds(engine)
    length = free_text.index(stop) + 2
    assert asked.written() == free_text[:length]
    assert asked.events[-1] == SequenceFinished(0, "stop", 2)


def test_nothing_to_write(engine: Engine) -> None:
    asked = ask(engine, b"only read", 0, n=2)
    rounds(engine)
    assert asked.events == [SequenceFinished(0, "length"), SequenceFinished(1, "length")]
    assert free(engine)


def test_who_goes_leaves_nothing(engine: Engine, model: LanguageModel) -> None:
    stays = ask(engine, b"stays", 30)
    seated = [ask(engine, bytes([i]), 500) for i in range(3)]
    engine.round()
    waits = ask(engine, b"waits", 500, n=4)
    long = ask(engine, b"x" * 400, 5)
    engine.round()
    inside = ask(engine, b"nobody has looked at it", 5)
    assert engine.running == 4
    assert engine._queue
    assert engine._prompts
    goes = [*seated, waits, long, inside]
    for each in goes:
        engine.cancel(each.request)
    engine.round()
    assert engine.in_flight == engine.running == 1
    told = [len(each.events) for each in goes]
    rounds(engine)
    assert [len(each.events) for each in goes] == told
    assert stays.written() == continued(model, b"stays", 30)
    engine.cancel(stays.request)  # long done
    engine.round()
    assert free(engine)


def test_no_more_than_there_is_room_for(model: LanguageModel) -> None:
    engine = Engine(model, EngineLimits(slots=2, queue=3, prefill_chunk=16))
    first = ask(engine, b"a", 3, n=4)
    with pytest.raises(EngineFull, match="engine: must hold at most 5 sequences, holds 4, got 2 more; try again later"):
        ask(engine, b"b", 3, n=2)
    ask(engine, b"c", 3)
    rounds(engine)
    assert first.finished == 4
    ask(engine, b"b", 3, n=5)


def test_a_prompt_that_cannot_be_read_fails_alone(
    engine: Engine, model: LanguageModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    honest = engine._prefiller.prefill

    def prefill(chunks: Any, states: Any, **options: Any) -> Any:
        if any(bytes(chunk[0].tolist()).startswith(b"bad") for chunk in chunks):
            raise RuntimeError("out of memory")
        return honest(chunks, states, **options)

    monkeypatch.setattr(engine._prefiller, "prefill", prefill)
    bad, good = ask(engine, b"bad one", 5, n=3), ask(engine, b"good one", 5)
    rounds(engine)
    assert bad.failed == "the prompt could not be prefilled; the log of the engine says why"
    assert good.written() == continued(model, b"good one", 5)
    assert "out of memory" in caplog.text
    assert free(engine)


@pytest.mark.usefixtures("replaying")
def test_of_prompts_that_are_read_together_a_bad_one_fails_alone(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, SMALL)
    honest = engine._prefiller.prefill

    def read(pieces: Any, states: Any, **options: Any) -> Any:
        if any(piece[0, 0] == ord("!") for piece in pieces):
            raise RuntimeError("out of memory")
        return honest(pieces, states, **options)

    monkeypatch.setattr(engine._prefiller, "prefill", read)
    texts = [b"one", b"!", b"another", b"the third of them", b"!!", b"last"]
    # The request of a bad prompt fails as a whole, with a good one that is read in the same pass.
    asked = [ask(engine, prompt, 5, others=[b"fine"] * prompt.startswith(b"!")) for prompt in texts]
    rounds(engine)
    for prompt, each in zip(texts, asked, strict=True):
        if prompt.startswith(b"!"):
            assert each.failed == "the prompt could not be prefilled; the log of the engine says why"
        else:
            assert each.written() == continued(model, prompt, 5)
    assert free(engine)


@pytest.fixture
def passes(model: LanguageModel, monkeypatch: pytest.MonkeyPatch, replaying: None) -> tuple[Engine, list[list[int]]]:
    """An engine that prefills up to 8 chunks of up to 4 bytes in a pass, or 4 of up to 16; the lengths in each pass."""
    monkeypatch.setattr("sma_models.inference.captured_chunks.SMALLEST", 4)
    engine, lengths = Engine(model, SMALL), list[list[int]]()
    honest = engine._prefiller.prefill

    def read(pieces: Any, states: Any, **options: Any) -> Any:
        lengths.append([piece.shape[1] for piece in pieces])
        return honest(pieces, states, **options)

    monkeypatch.setattr(engine._prefiller, "prefill", read)
    return engine, lengths


def test_pieces_of_one_size_share_a_pass(passes: tuple[Engine, list[list[int]]], model: LanguageModel) -> None:
    engine, lengths = passes
    written = [3, 10, 1, 16, 4, 2, 12, 37, 9, 3]
    asked = [ask(engine, bytes(range(n, 2 * n)), 3) for n in written]
    rounds(engine)
    for n, each in zip(written, asked, strict=True):
        assert each.written() == continued(model, bytes(range(n, 2 * n)), 3)
    # The first one is always prefilled, with those that fit; the rest of 37 bytes is of 16, and then of 5.
    assert lengths == [[3, 1, 4, 2, 3], [10, 16, 12, 16], [9, 16], [5]]
    assert free(engine)


def test_a_pass_with_rows_to_spare_waits_for_some_steps(passes: tuple[Engine, list[list[int]]]) -> None:
    engine, lengths = passes
    ask(engine, b"first", 200)
    engine.round()
    assert lengths == [[5]], "nobody writes, so that nothing is gained by waiting"
    few = [ask(engine, b"second", 1), ask(engine, b"third", 1)]
    for _ in range(_STEPS_BEFORE_PARTIAL_PASS - 1):
        engine.round()
        assert len(lengths) == 1
    engine.round()
    assert lengths[1:] == [[6, 5]]
    assert all(each.finished for each in few)
    for _ in range(_STEPS_BEFORE_PARTIAL_PASS):
        engine.round()
    ask(engine, b"nobody came then", 1)
    engine.round()
    assert lengths[2:] == [[16]]
    for i in range(5):
        ask(engine, b"many of one size"[i:], 1)
    engine.round()
    assert lengths[3:] == [[16, 15, 14, 13]], "a full one, and no more than one between two steps"
    engine.round()
    assert len(lengths) == 4


def test_where_texts_wait_for_a_slot_reading_is_in_no_hurry(passes: tuple[Engine, list[list[int]]]) -> None:
    engine, lengths = passes
    ask(engine, b"more than there are slots", 200, n=SMALL.slots + 1)
    while engine.running < SMALL.slots:
        engine.round()
    late, read = ask(engine, b"late", 1), len(lengths)
    for _ in range(_STEPS_WITH_QUEUE - 1):
        engine.round()
    assert len(lengths) == read
    engine.round()
    assert lengths[read:] == [[4]]
    for i in range(8):
        ask(engine, bytes([i]), 1)
    engine.round()
    assert lengths[read + 1 :] == [[1] * 8], "a full one"
    rounds(engine)
    assert late.finished


def test_nobody_waits_for_ever_to_be_read(passes: tuple[Engine, list[list[int]]]) -> None:
    engine, lengths = passes
    ask(engine, b"writes", 300)
    engine.round()
    long = ask(engine, b"x" * 6 * SMALL.prefill_chunk, 1)
    count = 0
    while not long.finished:
        for _ in range(4):
            ask(engine, b"abc", 0)
        engine.round()
        count += 1
        assert count <= 6 * 2 * _STEPS_BEFORE_PARTIAL_PASS
    assert lengths.count([16]) == 6


def test_a_step_that_fails_ends_everything(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def step(tokens: Any) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(engine._decoder, "step", step)
    asked = [ask(engine, bytes([i]), 9) for i in range(9)]
    engine.start()
    assert until(lambda: not engine.alive and not engine.in_flight)
    assert {each.failed for each in asked} == {"the engine failed; its log says why"}
    assert "the device is gone" in caplog.text
    with pytest.raises(EngineStopped, match="engine: accepts no requests any more, it was stopped or has failed"):
        ask(engine, b"a")
    engine.stop()


def test_in_a_thread(engine: Engine, model: LanguageModel) -> None:
    engine.start()
    asked: list[Any] = []
    threads = [threading.Thread(target=lambda i=i: asked.append((i, ask(engine, bytes([i] * 5), 7)))) for i in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert until(lambda: not engine.in_flight)
    assert until(lambda: all(each.finished for _, each in asked))
    assert all(each.written() == continued(model, bytes([i] * 5), 7) for i, each in asked)
    late = ask(engine, b"late", 600)
    assert engine.stop() == 1
    assert late.failed == "the engine was stopped before the request was finished"
    with pytest.raises(EngineStopped, match="was stopped"):
        ask(engine, b"too late")


def test_models_that_cannot_be_served() -> None:
    with pytest.raises(ConfigError, match=r"model: must be a language model of bytes \(vocab_size 256\), got Language"):
        Engine(tiny("seqboat_small_lm"), SMALL)
    with pytest.raises(ConfigError, match="got Classifier"):
        Engine(tiny("seqboat_text"), SMALL)
    with pytest.raises(ConfigError, match="must be in evaluation mode"):
        Engine(byte_model().train(), SMALL)


def test_limits_out_of_range() -> None:
    for values, message in (
        ({"slots": 0}, "slots: must be at least 1, got 0"),
        ({"queue": -1}, "queue: must be at least 0, got -1"),
        ({"quantum": 0}, "quantum: must be at least 1, got 0"),
        ({"prefill_chunk": 0}, "prefill_chunk: must be at least 1, got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            EngineLimits(**values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_texts_in_low_precision(dtype: torch.dtype) -> None:
    """Where rounding decides, shapes have to be the same: generate has one row, so the engine has one slot."""
    model = byte_model().to(dtype)
    engine = Engine(model, EngineLimits(slots=1, queue=9, quantum=7, prefill_chunk=16))
    asked = [ask(engine, prompt, 60) for prompt in PROMPTS]
    rounds(engine)
    assert [each.written() for each in asked] == [continued(model, prompt, 60) for prompt in PROMPTS]


def likelihoods_of(events: list[Event]) -> list[float]:
    read = [each for event in events if isinstance(event, PromptPrefilled) for each in event.likelihoods]
    return [each.own for each in read if each is not None]


def test_pieces_that_are_replayed_tell_the_same(
    model: LanguageModel, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of six whole chunks and a rest, and of less: more than are prefilled together, so that they take turns.
    monkeypatch.setattr("sma_models.inference.captured_chunks.SMALLEST", 4)
    texts = [bytes(range(first, first + length)) for first, length in ((0, 100), (40, 100), (7, 3), (9, 16), (1, 40))]

    def told(replayed: bool) -> list[list[Event]]:
        engine = Engine(model, SMALL)
        asked = [ask(engine, prompt, 6, likelihoods=2, prompt_likelihoods=True, activations=True) for prompt in texts]
        rounds(engine)
        assert (engine._prefiller.rows, engine._prefiller.captured) == ((4, True) if replayed else (1, False))
        assert free(engine)
        return [each.events for each in asked]

    launched = told(False)
    request.getfixturevalue("replaying")
    for one, other in zip(launched, told(True), strict=True):
        assert [e for e in one if isinstance(e, TokenActivations)] == [
            e for e in other if isinstance(e, TokenActivations)
        ]
        assert [e.token for e in one if isinstance(e, TokenGenerated)] == [
            e.token for e in other if isinstance(e, TokenGenerated)
        ]
        mine, theirs = map(likelihoods_of, (one, other))
        assert len(mine) in (99, 2, 15, 39)
        assert mine == pytest.approx(theirs, abs=1e-9)
