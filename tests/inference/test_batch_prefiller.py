"""Chunks of several prompts share a pass, and no prompt depends on the others."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from sma.errors import ConfigError, StreamingError
from sma_models.inference import Prefiller
from sma_models.inference.batch_prefiller import BatchPrefiller, BatchShape
from sma_models.language_model import LanguageModel
from tests.inference.replayed import tensors_of
from tests.inference.test_decoder import close, double, every_language_model
from tests.models.tiny import inputs_of, tiny

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@every_language_model
@pytest.mark.usefixtures("replaying")
def test_chunks_of_several_prompts_share_a_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sma_models.inference.captured_chunks.SMALLEST", 2)
    model = double(name)
    prefiller, tokens = BatchPrefiller(model, 9, rows=3), inputs_of(model, batch=3, length=40)
    assert prefiller.shapes == [BatchShape(2, 6), BatchShape(8, 3), BatchShape(9, 3)]
    states: list[Any] = [prefiller.initial_state()] * 3
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
        chunks = [tokens[row : row + 1, at[row] : at[row] + length] for row, length in zip(rows, lengths, strict=True)]
        outs = prefiller.prefill(chunks, [states[row] for row in rows])
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
    assert all(each.graph.ready for each in prefiller._passes.values())
    with pytest.raises(ConfigError, match="chunks: must be at most 3 of up to 8 tokens, got 4"):
        prefiller.prefill([tokens[:1, :1], *[tokens[:1, :5]] * 4], [prefiller.initial_state()] * 5)
    with pytest.raises(StreamingError, match="state: must be of 1 sequences like the input, got 2"):
        prefiller.prefill([tokens[:1, :1]], [model.initial_state(2)])


def check_independence(model: LanguageModel, tokens: Tensor) -> None:
    """The result for a chunk of ``tokens (14, 64)`` has the same bits whatever else is in its pass, in whatever row."""
    prefiller = BatchPrefiller(model, 64, rows=2)
    assert prefiller.shapes == [BatchShape(4, 8), BatchShape(16, 4), BatchShape(64, 2)]
    prefiller.warm_up()
    lengths = [1, 2, 3, 4, 4, 3, 2, 1, 5, 9, 16, 16, 17, 64]
    chunks = [tokens[i : i + 1, :length] for i, length in enumerate(lengths)]

    def prefill(those: list[int]) -> dict[int, list[Tensor]]:
        outs = prefiller.prefill([chunks[i] for i in those], [prefiller.initial_state()] * len(those))
        return {i: tensors_of((out.x.clone(), out.state)) for i, out in zip(those, outs, strict=True)}

    everyone = list(range(14))
    together = prefill(everyone)
    for others in (everyone[::-1], everyone[1::3], *([i] for i in everyone)):
        for i, found in prefill(others).items():
            assert all(map(torch.equal, found, together[i]))


@pytest.mark.usefixtures("replaying")
def test_what_a_prompt_gives_does_not_depend_on_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sma_models.inference.captured_chunks.SMALLEST", 4)
    model: LanguageModel = tiny("seqboat_lm")  # single precision: a bit would show
    check_independence(model, inputs_of(model, batch=14, length=64))


def test_rows_only_where_a_graph_can_hold_them(replaying: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("seqboat_small_lm")
    assert BatchPrefiller(model, 16_384, rows=3).rows == 1, "too many rows"
    assert BatchPrefiller(model, 8, rows=3).shapes == [BatchShape(8, 3)]
    prefiller = BatchPrefiller(model, 2048, rows=4)
    assert prefiller.shapes == [BatchShape(128, 16), BatchShape(512, 8), BatchShape(2048, 4)]
    assert [prefiller.shape_of(length).columns for length in (1, 128, 129, 512, 513, 2048)] == [128, 128, 512, 512] + [
        2048
    ] * 2
    monkeypatch.undo()
    assert BatchPrefiller(model, 2048, rows=3).shapes == [BatchShape(2048, 1)], "nothing is captured"
    with pytest.raises(ConfigError, match="rows: must be at least 1, got 0"):
        BatchPrefiller(model, 8, rows=0)


@pytest.mark.usefixtures("replaying")
def test_after_the_warm_up_no_pass_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sma_models.inference.captured_chunks.SMALLEST", 4)
    prefiller = BatchPrefiller(tiny("seqboat_small_lm"), 20, rows=2)
    prefiller.warm_up()
    assert list(prefiller._passes) == prefiller.shapes == [BatchShape(4, 4), BatchShape(16, 2), BatchShape(20, 2)]
    assert all(each.graph.ready for each in prefiller._passes.values())


def check_continuation(prefiller: Prefiller, further: Tensor, one: Any, other: Any) -> None:
    """The same tokens after two states give the same.

    The states themselves may differ: a truncated average keeps the tokens of a short prompt, and sums of a long one.
    """
    mine, theirs = (prefiller.forward_chunk(further, state) for state in (one, other))
    torch.testing.assert_close(mine.x, theirs.x, rtol=0, atol=1e-4)
    assert mine.routings.keys() == theirs.routings.keys()
    for name, routing in theirs.routings.items():
        assert torch.equal(mine.routings[name].active, routing.active)
        assert torch.equal(mine.routings[name].position, routing.position)
        torch.testing.assert_close(mine.routings[name].confidence, routing.confidence, rtol=0, atol=1e-4)


@needs_a_gpu
def test_captured_chunks_are_the_launched_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sma_models.inference.captured_chunks.SMALLEST", 16)
    model: LanguageModel = deepcopy(tiny("seqboat_lm")).cuda()
    tokens = inputs_of(model, batch=10, length=200).cuda()
    further = inputs_of(model, batch=1, length=40, seed=1).cuda()
    captured, launched = BatchPrefiller(model, 200, rows=2), Prefiller(model, 200, capture=False)
    captured.warm_up()
    assert not captured.uncaptured
    assert captured.shapes == [BatchShape(16, 6), BatchShape(64, 2), BatchShape(200, 2)]
    lengths = [1, 4, 16, 15, 2, 9, 17, 64, 65, 200]
    chunks = [tokens[i : i + 1, :length] for i, length in enumerate(lengths)]
    outs = captured.prefill(chunks, [captured.initial_state()] * len(chunks))
    assert all(each.graph.ready for each in captured._passes.values())
    for chunk, out in zip(chunks, outs, strict=True):
        expected = launched.forward_chunk(chunk, launched.initial_state())
        torch.testing.assert_close(out.x, expected.x, rtol=0, atol=1e-4)
        check_continuation(launched, further, out.state, expected.state)
    for state in [out.state for out in outs]:
        assert state is not None
        (alone,) = captured.prefill([further], [state])
        torch.testing.assert_close(alone.x, launched.forward_chunk(further, state).x, rtol=0, atol=1e-4)


@needs_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_captured_chunks_do_not_depend_on_the_others(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sma_models.inference.captured_chunks.SMALLEST", 4)
    model: LanguageModel = tiny("seqboat_lm", d_model=96).to("cuda", dtype)
    check_independence(model, inputs_of(model, batch=14, length=64).cuda())
