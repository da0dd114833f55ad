"""A decoder gives the logits of the parallel model, whatever else is in the batch, and its memory is fixed."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sma.errors import ConfigError, ShapeError, StreamingError
from sma.ops import using
from sma_models.inference import Decoder, prefill
from sma_models.language_model import LanguageModel
from sma_modules.modules.gau import GAUStepper
from tests.devices import DEVICE, needs_triton
from tests.models.tiny import SPECS, VOCABULARY, inputs_of, tiny

every_language_model = pytest.mark.parametrize("name", [name for name in SPECS if name.endswith("_lm")])


def double(name: str = "seqboat_small_lm") -> LanguageModel:
    """A model in which differences of rounding decide nothing."""
    model: LanguageModel = deepcopy(tiny(name)).double().eval()
    return model


def whole(model: LanguageModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(tokens).logits
    return logits


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("prompt", [1, 18])
@every_language_model
def test_every_step_is_that_of_the_parallel_model(name: str, prompt: int) -> None:
    model = double(name)
    tokens = inputs_of(model, length=48)
    expected = whole(model, tokens)
    decoder = Decoder(model, 3, prefill_chunk=7)
    assert decoder.join_all(tokens[:, :prompt]) == [0, 1, 2]
    close(decoder.logits, expected[:, prompt - 1])
    for t in range(prompt, 48):
        close(decoder.step(tokens[:, t]), expected[:, t])
    assert decoder.positions.tolist() == [48] * 3


@every_language_model
def test_sequences_come_and_go(name: str) -> None:
    model = double(name)
    rows = [inputs_of(model, batch=1, length=40, seed=seed)[0] for seed in range(5)]
    expected = [whole(model, row[None])[0] for row in rows]
    decoder = Decoder(model, 2)
    at: dict[int, tuple[int, int]] = {}  # by slot: which row, and how many of its tokens were read
    waiting = [(row, 3 + 4 * row) for row in range(5)]
    left = []
    while waiting or at:
        while waiting and decoder.free:
            row, length = waiting.pop(0)
            slot = decoder.join(rows[row][:length])
            close(decoder.logits[slot], expected[row][length - 1])
            at[slot] = row, length
        logits = decoder.step({slot: int(rows[row][length]) for slot, (row, length) in at.items()})
        for slot, (row, length) in list(at.items()):
            close(logits[slot], expected[row][length])
            at[slot] = row, length + 1
            if length + 1 == 20 + 3 * row:
                decoder.leave(slot)
                left.append(row)
                del at[slot]
    assert sorted(left) == [0, 1, 2, 3, 4]
    assert decoder.free == 2


@every_language_model
def test_some_may_wait(name: str) -> None:
    model = double(name)
    tokens = inputs_of(model, length=40)
    expected = whole(model, tokens)
    decoder = Decoder(model, 3)
    decoder.join_all(tokens[:, :5])
    at = [5, 5, 5]
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        some = [slot for slot in range(3) if torch.rand((), generator=generator) < 0.6]
        before = decoder.logits.clone()
        logits = decoder.step({slot: int(tokens[slot, at[slot]]) for slot in some})
        for slot in range(3):
            close(logits[slot], expected[slot, at[slot]] if slot in some else before[slot])
            at[slot] += slot in some


@every_language_model
def test_a_state_is_what_forward_goes_on_from(name: str) -> None:
    model = double(name)
    tokens = inputs_of(model, batch=2, length=40)
    expected = whole(model, tokens)
    decoder = Decoder(model, 2)
    decoder.join_all(tokens[:, :4])
    for t in range(4, 23):
        decoder.step(tokens[:, t])
    state = decoder.read(1)
    with torch.no_grad():
        close(model(tokens[1:, 23:], state).logits, expected[1:, 23:])
    for t in range(23, 40):
        decoder.step(tokens[:, t])
    decoder.write(0, state)  # the other sequence again, from where it was
    for t in range(23, 40):
        close(decoder.step({0: int(tokens[1, t])})[0], expected[1, t])


@every_language_model
def test_drafts_are_taken_back(name: str) -> None:
    model = double(name)
    tokens = inputs_of(model, batch=2, length=60)
    expected = whole(model, tokens)
    decoder = Decoder(model, 2, rollback=3)
    decoder.join_all(tokens[:, :4])
    at = [4, 4]
    generator = torch.Generator().manual_seed(1)
    while min(at) < 50:
        drafts = int(torch.randint(1, 4, (), generator=generator))
        slot = int(torch.randint(2, (), generator=generator))
        for _ in range(drafts):
            decoder.step({slot: int(torch.randint(VOCABULARY, (), generator=generator))})
        first = int(torch.randint(drafts + 1, (), generator=generator))
        decoder.take_back(slot, first)
        decoder.take_back(slot, drafts - first)
        for slot in range(2):
            if at[slot] < 60:
                close(decoder.step({slot: int(tokens[slot, at[slot]])})[slot], expected[slot, at[slot]])
                at[slot] += 1


def test_no_more_is_taken_back_than_is_remembered() -> None:
    model = double()
    decoder = Decoder(model, 1, rollback=2)
    decoder.join(torch.tensor([1, 2, 3]))
    with pytest.raises(StreamingError, match="slot 0: can take back up to 0 tokens, got 1"):
        decoder.take_back(0, 1)
    for token in range(4):
        decoder.step({0: token})
    decoder.take_back(0, 1)
    with pytest.raises(StreamingError, match="up to 1 tokens, got 2"):
        decoder.take_back(0, 2)
    with pytest.raises(StreamingError, match="up to 1 tokens, got -1"):
        decoder.take_back(0, -1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts(side: str) -> None:
    model = double()
    tokens = inputs_of(model, batch=2, length=12)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, 7:] = False
    if side == "left":
        valid = valid.flip(1)
    decoder = Decoder(model, 2, prefill_chunk=4)
    decoder.join_all(tokens, valid=valid)
    close(decoder.logits[1], whole(model, tokens[1:, valid[1]])[0, -1])
    assert decoder.positions.tolist() == [12, 7]


@every_language_model
def test_memory_is_fixed(name: str) -> None:
    model = tiny(name)
    decoder = Decoder(model, 3)
    tokens = inputs_of(model, length=30)
    before = [tensor.data_ptr() for _, part in decoder._stepper.walk() for tensor in part.memory()]
    size = decoder.nbytes
    decoder.join_all(tokens[:, :3])
    for t in range(3, 30):
        decoder.step(tokens[:, t])
    assert decoder.nbytes == size > 0
    assert [tensor.data_ptr() for _, part in decoder._stepper.walk() for tensor in part.memory()] == before


def test_the_unit_of_a_layer_takes_the_short_way() -> None:
    """Unless its projections have hooks or were changed."""
    model = double()
    expected = whole(model, tokens := inputs_of(model, batch=1, length=8))
    for watched in (False, True):
        if watched:
            model.stack.layers[0].activate.module.h_proj.register_forward_hook(lambda module, args, out: out)
        decoder = Decoder(model, 1)
        unit = dict(decoder._stepper.walk())["layers.0.activate.module"]
        assert isinstance(unit, GAUStepper)
        assert unit.is_plain is not watched
        decoder.join(tokens[0, :5])
        for t in range(5, 8):
            close(decoder.step(tokens[:, t]), expected[:, t])


def test_who_was_active() -> None:
    model = double()
    tokens = inputs_of(model, length=20)
    with torch.no_grad():
        routings = model(tokens).routings
    decoder = Decoder(model, 3)
    decoder.join_all(tokens[:, :1])
    for t in range(1, 20):
        decoder.step(tokens[:, t])
        assert list(decoder.decisions) == list(routings)
        for name, decision in decoder.decisions.items():
            assert torch.equal(decision.active, routings[name].active[:, t])
            close(decision.confidence, routings[name].confidence[:, t])


def test_weights_that_change_in_place() -> None:
    model = double()
    decoder = Decoder(model, 1)
    tokens = inputs_of(model, batch=1, length=10)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    decoder.refresh()
    decoder.join(tokens[0, :4])
    close(decoder.step({0: int(tokens[0, 4])}), whole(model, tokens)[:, 4])


def test_prompts_that_go_on() -> None:
    model = double()
    tokens = inputs_of(model, batch=1, length=20)[0]
    decoder = Decoder(model, 2)
    state = prefill(model, tokens[None, :7]).state
    slot = decoder.join(tokens[7:12], state)
    close(decoder.logits[slot], whole(model, tokens[None])[0, 11])
    other = decoder.acquire()
    assert decoder.positions.tolist() == [12, 0]
    close(decoder.step({other: int(tokens[0])})[other], whole(model, tokens[None])[0, 0])


def test_bad_input_is_refused() -> None:
    model = double()
    for options, message in (
        ({"slots": 0}, "slots: must be at least 1, got 0"),
        ({"slots": 1, "rollback": -1}, "rollback: must be at least 0, got -1"),
        ({"slots": 1, "prefill_chunk": 0}, "prefill_chunk: must be at least 1, got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            Decoder(model, **options)
    with pytest.raises(ConfigError, match="must be in evaluation mode"):
        Decoder(double().train(), 1)
    decoder = Decoder(model, 2)
    with pytest.raises(StreamingError, match=r"slot 1: holds no sequence; those that do are \[\]"):
        decoder.leave(1)
    with pytest.raises(ShapeError, match=r"prompt: must be one row of tokens \(L,\), got \(1, 2\)"):
        decoder.join(torch.zeros(1, 2, dtype=torch.int64))
    decoder.join(torch.tensor([1]))
    with pytest.raises(StreamingError, match="1 of 2 slots are free, got 2 sequences"):
        decoder.join_all(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(StreamingError, match="slot 1: holds no sequence"):
        decoder.step({0: 1, 1: 1})
    with pytest.raises(ShapeError, match=r"tokens\[0\]: must lie in 0..15, got 16"):
        decoder.step({0: 16})
    with pytest.raises(ShapeError, match=r"tokens: must be integers of shape \(2,\), got torch.int64 \(1,\)"):
        decoder.step(torch.tensor([1]))
    short = model.initial_state(1)
    before = decoder.read(0)
    with pytest.raises(StreamingError, match=r"does not fit the model: layers.1 must be SeqBoatState, got absent"):
        decoder.write(0, replace(short, layers=short.layers[:1]))
    with pytest.raises(StreamingError, match="must be a StackState, got SeqBoatState"):
        decoder.write(0, short.layers[0])
    for other in ("transformer_lm", "seqboat_lm"):  # the second one has a truncation
        with pytest.raises(StreamingError, match=r"does not fit the model: layers\.0"):
            decoder.write(0, double(other).initial_state(1))
    with pytest.raises(StreamingError, match="must be of 1 sequences, got 2"):
        decoder.write(0, model.initial_state(2))
    assert all(map(torch.equal, decoder.read(0).tensors(), before.tensors()))  # nothing was written
    assert decoder.step({0: 3}).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_greedy_text_is_the_same_bits_whoever_else_is_there(dtype: torch.dtype) -> None:
    model = deepcopy(tiny("seqboat_small_lm")).to(dtype)
    prompts = inputs_of(model, length=9)

    def text(slots: list[int], size: int) -> Tensor:
        decoder = Decoder(model, size)
        at = {row: decoder.join(prompts[row]) for row in slots}
        drawn = []
        for _ in range(24):
            drawn.append(decoder.logits.argmax(-1))
            decoder.step(drawn[-1])
        return torch.stack(drawn, 1)[[at[row] for row in sorted(at)]]

    assert torch.equal(text([0, 1, 2], 3), text([2, 0, 1], 3))
    assert torch.equal(text([0, 1, 2], 3), text([0, 1, 2], 3))


@pytest.mark.parametrize("name", ["seqboat_small_lm", "seqboat_lm"])
def test_at_a_hundred_thousand_tokens(name: str) -> None:
    """Parallel, in chunks, and step by step from points along the stream."""
    model, length, steps = tiny(name), 100_000, 12
    tokens = inputs_of(model, batch=1, length=length)
    expected = whole(model, tokens)[0]
    decoder, state, read = Decoder(model, 1), model.initial_state(1), 0
    for point in (5_000, 60_000, length - steps):
        there = prefill(model, tokens[:, read:point], state, chunk=8192)
        state, read = there.state, point
        torch.testing.assert_close(there.logits[0], expected[point - 1], rtol=0, atol=1e-5)
        slot = decoder.acquire()
        decoder.write(slot, state)
        for t in range(point, point + steps):
            logits = decoder.step({slot: int(tokens[0, t])})
            torch.testing.assert_close(logits[slot], expected[t], rtol=0, atol=1e-5)
        decoder.leave(slot)


def test_the_device_says_who_takes_a_token() -> None:
    model = double()
    tokens = inputs_of(model, batch=3, length=30)
    decoder = Decoder(model, 3)
    slots = decoder.resume(*prefill(model, tokens[:, :20]))
    assert slots == [0, 1, 2]
    rows = [tokens[i, :20].tolist() for i in range(3)]
    for t in range(20, 30):
        live = torch.tensor([True, t % 2 == 0, t < 23])
        decoder.step(tokens[:, t], live=live)
        for i in range(3):
            if live[i]:
                rows[i].append(int(tokens[i, t]))
    decoder.step({0: 1, 2: 5})  # and afterwards again who is named here
    rows[0].append(1)
    rows[2].append(5)
    for i, row in enumerate(rows):
        close(decoder.logits[i], whole(model, torch.tensor([row]))[0, -1])
    with pytest.raises(ShapeError, match=r"live: must be bool of shape \(3,\), got torch.bool \(2,\)"):
        decoder.step(tokens[:, 0], live=torch.tensor([True, False]))
    with pytest.raises(StreamingError, match="live: must not be given to a decoder with rollback=2"):
        Decoder(model, 3, rollback=2).step(tokens[:, 0], live=torch.ones(3, dtype=torch.bool))
    with pytest.raises(StreamingError, match="0 of 3 slots are free, got 2 sequences"):
        decoder.resume(prefill(model, tokens[:2]).state)


@pytest.mark.parametrize("change", [lambda seen: seen + 1, lambda seen: seen.repeat(2)], ids=["number", "batch"])
def test_layers_that_have_seen_different_streams_are_refused(change: Callable[[Tensor], Tensor]) -> None:
    model = double()
    state = prefill(model, inputs_of(model, batch=1, length=5)).state
    names = iter(state.named_tensors())
    last = max(name for name in state.named_tensors() if name.endswith(".seen"))
    broken = state.map(lambda tensor: change(tensor) if next(names) == last else tensor)
    decoder = Decoder(model, 1)
    with pytest.raises(StreamingError, match="state: "):
        decoder.resume(broken)
    assert decoder.free == 1


@needs_triton
def test_with_kernels() -> None:
    model = tiny("seqboat_lm").to(DEVICE)
    tokens = inputs_of(model, batch=2, length=14).to(DEVICE)
    expected = whole(model, tokens)
    decoder = Decoder(model, 2, rollback=1)
    decoder.join_all(tokens[:, :3])
    with using("triton"):
        for t in range(3, 14):
            torch.testing.assert_close(decoder.step(tokens[:, t]), expected[:, t], rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@every_language_model
def test_captured_steps_are_the_launched_ones(name: str) -> None:
    model = deepcopy(tiny(name)).cuda()
    tokens = inputs_of(model, length=40).cuda()
    captured, launched = (Decoder(model, 3, capture=capture) for capture in (True, False))
    another = prefill(model, tokens[2:, :7], capture=False)  # the same bits for both
    for decoder in (captured, launched):
        decoder.join_all(tokens[:, :9])
    for t in range(9, 40):
        assert torch.equal(captured.step(tokens[:, t]), launched.step(tokens[:, t]))
        if t == 25:  # the graph continues with the sequences that are there
            for decoder in (captured, launched):
                decoder.leave(1)
                decoder.resume(another.state, another.logits)
    assert captured.captured
    assert not captured.uncaptured
    assert not launched.captured
    torch.testing.assert_close(captured.logits[0].cpu(), whole(tiny(name), tokens.cpu())[0, -1], rtol=0, atol=1e-4)
