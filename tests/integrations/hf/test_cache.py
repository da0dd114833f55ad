"""The cache: bounded, copied, reordered, repeated, chosen from and taken back from, like the states it holds."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from sma.errors import StreamingError
from sma_models.integrations.hf import SMACache, SMAForCausalLM, from_model
from sma_models.integrations.hf import cache as caches
from sma_models.stack import StackState
from tests.integrations.hf.test_models import LANGUAGE_MODELS
from tests.models.tiny import inputs_of, tiny


@pytest.fixture(autouse=True)
def _without_gradients():  # type: ignore[no-untyped-def]
    with torch.no_grad():
        yield


def test_a_cache_does_not_grow(model: SMAForCausalLM) -> None:
    cache = SMACache()
    assert (cache.get_seq_length(), cache.nbytes, cache.batch_size) == (0, 0, -1)
    sizes = {model(chunk, cache=cache).cache.nbytes for chunk in torch.randint(256, (2, 500)).split(50, 1)}
    assert len(sizes) == 1
    assert (cache.get_seq_length(), cache.batch_size, len(cache)) == (500, 2, 1)
    assert (cache.get_max_length(), cache.is_compileable, cache.is_croppable) == (-1, False, True)
    assert (cache.is_linear, cache.is_sliding) == ([False], [False])
    assert cache.get_mask_sizes(3, 0) == (503, 0)
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes, cache.state) == (0, 0, None)


def test_a_copy_goes_its_own_way(model: SMAForCausalLM) -> None:
    tokens = inputs_of(model.model)
    cache = model(tokens, use_cache=True).cache
    other = copy.deepcopy(cache)
    expected = model(tokens[:, :3], cache=cache).logits
    assert (cache.get_seq_length(), other.get_seq_length()) == (27, 24)
    assert torch.equal(model(tokens[:, :3], cache=other).logits, expected)


def test_rows(model: SMAForCausalLM) -> None:
    tokens, more = inputs_of(model.model), inputs_of(model.model, length=4, seed=2)
    expected = model(more, cache=model(tokens, use_cache=True).cache).logits

    def check(change: str, argument: Tensor | int, rows: list[int]) -> None:
        cache = model(tokens, use_cache=True).cache
        getattr(cache, change)(argument)
        assert cache.batch_size == len(rows)
        torch.testing.assert_close(model(more[rows], cache=cache).logits, expected[rows], rtol=0, atol=1e-5)

    check("reorder_cache", torch.tensor([2, 0, 2]), [2, 0, 2])
    check("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2])
    check("batch_select_indices", torch.tensor([1]), [1])
    check("batch_select_indices", torch.tensor([True, False, True]), [0, 2])
    fresh = SMACache()
    fresh.reorder_cache(torch.tensor([0]))
    fresh.batch_repeat_interleave(2)
    fresh.batch_select_indices(torch.tensor([0]))
    assert fresh.state is None


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@pytest.mark.parametrize("chunks", [(10, 1, 1, 1), (10, 3), (4, 9), (13,)], ids=str)
@pytest.mark.parametrize("removed", [0, 1, 2, 3])
def test_what_is_taken_back_leaves_no_trace(name: str, chunks: tuple[int, ...], removed: int) -> None:
    model = from_model(tiny(name).double())
    tokens, more = inputs_of(model.model, length=13), inputs_of(model.model, length=6, seed=2)
    valid = torch.rand(3, 13) < 0.8
    kept = 13 - removed
    clean = model(tokens[:, :kept], attention_mask=valid[:, :kept], use_cache=True).cache
    cache = SMACache()
    cache.activate_past_recording()
    for part, mask in zip(tokens.split(list(chunks), 1), valid.split(list(chunks), 1), strict=True):
        model(part, attention_mask=mask, cache=cache)
    cache.crop(-removed)
    assert cache.get_seq_length() == kept
    for part in more.split([2, 4], 1):
        expected = model(part, cache=clean).logits
        torch.testing.assert_close(model(part, cache=cache).logits, expected, rtol=0, atol=1e-9)
    assert cache.get_seq_length() == clean.get_seq_length() == kept + 6


def test_taking_back_twice_and_reordering_between(model: SMAForCausalLM) -> None:
    tokens, more = inputs_of(model.model, length=12), inputs_of(model.model, length=2, seed=2)
    cache, rows = SMACache(), torch.tensor([1, 1, 0])
    cache.activate_past_recording()
    for part in tokens.split([4, 4, 4], 1):
        model(part, cache=cache)
    cache.crop(-3)
    cache.reorder_cache(rows)
    cache.crop(-4)
    expected = model(more, cache=model(tokens[rows, :5], use_cache=True).cache).logits
    assert cache.get_seq_length() == 5
    torch.testing.assert_close(model(more, cache=cache).logits, expected, rtol=0, atol=1e-5)


def test_tokens_that_are_read_again_give_no_logits(model: SMAForCausalLM) -> None:
    tokens = inputs_of(model.model, length=12)
    cache = SMACache()
    cache.activate_past_recording()
    model(tokens[:, :10], cache=cache)
    cache.crop(-4)
    assert model(tokens[:, 6:9], cache=cache, logits_to_keep=99).logits.shape == (3, 3, 256)
    cache.crop(-2)
    assert model(tokens[:, 7:9], cache=cache).logits.shape == (3, 2, 256)


def test_only_what_was_recorded_can_be_taken_back(model: SMAForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = inputs_of(model.model, length=12)
    cache = model(tokens, use_cache=True).cache
    with pytest.raises(StreamingError, match=r"at most the 0 tokens recorded .* can go, got 1"):
        cache.crop(-1)
    with pytest.raises(StreamingError, match="must be given minus the number of tokens to remove, got 2"):
        cache.crop(2)
    cache.activate_past_recording()
    model(tokens[:, :5], cache=cache)
    with pytest.raises(StreamingError, match="at most the 5 tokens recorded"):
        cache.crop(-6)
    cache.crop(0)
    with pytest.raises(StreamingError, match="at most the 0 tokens"):
        cache.crop(-1)
    monkeypatch.setattr(caches, "MOST_PAST", 4)
    for token in tokens.split(1, 1):
        model(token, cache=cache)
    with pytest.raises(StreamingError, match="at most the 4 tokens"):
        cache.crop(-5)
    assert cache.get_seq_length() == 29


def test_it_holds_no_keys_and_values() -> None:
    with pytest.raises(StreamingError, match="holds the state of a model of this library, not keys and values"):
        SMACache().update(torch.zeros(1), torch.zeros(1), 0)


def test_a_cache_of_another_batch_or_model_is_refused(model: SMAForCausalLM) -> None:
    cache = model(torch.tensor([[1, 2]]), use_cache=True).cache
    with pytest.raises(StreamingError, match="state: must be of 2 sequences like the input, got 1"):
        model(torch.tensor([[1], [2]]), cache=cache)
    other = from_model(tiny("seqboat_small_lm", n_layers=3))
    with pytest.raises(StreamingError, match=r"layers\.2 must be SeqBoatState, got absent"):
        other(torch.tensor([[1]]), cache=cache)


def test_a_cache_goes_on_from_a_state(model: SMAForCausalLM) -> None:
    tokens = inputs_of(model.model, batch=2, length=20)
    with torch.no_grad():
        cache = model(tokens[:, :12], use_cache=True).cache
        again = SMACache.of(cache.state.clone(), cache.get_seq_length())
        assert (again.get_seq_length(), again.layer.batch_size, again.nbytes) == (12, 2, cache.nbytes)
        more = {"max_new_tokens": 4, "do_sample": False}
        one, other = [model.generate(tokens[:, :13], cache=each, **more) for each in (cache, again)]
        assert torch.equal(one, other)
        assert again.get_seq_length() == 16
    with pytest.raises(StreamingError, match="state: holds no tensor"):
        SMACache.of(StackState((None,)), 3)


MODES = {"inference": torch.inference_mode, "plain": torch.no_grad, "gradients": torch.enable_grad}


@pytest.mark.parametrize("first", MODES)
@pytest.mark.parametrize("then", MODES)
def test_what_a_call_leaves_behind_is_of_no_mode(model: SMAForCausalLM, first: str, then: str) -> None:
    """Inference mode ends with the call; neither the memory of the model nor a cache stays in it."""
    tokens = inputs_of(model.model, length=12)
    expected = model(tokens).logits

    def check(cache: SMACache, start: int) -> None:
        for t in range(start, start + 2):
            logits = model(tokens[:, t : t + 1], cache=cache).logits[:, -1]
            torch.testing.assert_close(logits, expected[:, t], rtol=0, atol=1e-5)

    options: list[dict[str, Any]] = [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}]
    cache = SMACache()
    with MODES[first]():
        model(tokens[:, :4], cache=cache)
        check(cache, 4)
        first_texts = [model.generate(tokens[:1], max_new_tokens=3, do_sample=False, **each) for each in options]
        cache.activate_past_recording()
        model(tokens[:, 6:8], cache=cache)
        cache.crop(-1)
    with MODES[then]():
        texts = [model.generate(tokens[:1], max_new_tokens=3, do_sample=False, **each) for each in options]
        check(cache, 7)
        cache.reorder_cache(torch.arange(3))
        check(cache, 9)
    assert all(map(torch.equal, texts, first_texts))
    with torch.enable_grad():
        logits = model(tokens[:, 11:], cache=cache).logits
        logits.sum().backward()
    torch.testing.assert_close(logits[:, 0], expected[:, 11], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_a_model_that_was_built_in_inference_mode() -> None:
    model = from_model(tiny("seqboat_small_lm"))
    tokens = inputs_of(model.model, length=12)
    cache = model(tokens[:, :10], use_cache=True).cache
    state = copy.deepcopy(cache.state)
    model(tokens[:, 10:11], cache=cache)
    state = model.model(tokens[:, 10:11], state).state
    for parameter in model.parameters():
        parameter.mul_(1.5)  # no version counter counts this
    expected = model.model(tokens[:, 11:], state).logits
    torch.testing.assert_close(model(tokens[:, 11:], cache=cache).logits, expected, rtol=0, atol=1e-5)
    written = model.generate(tokens, max_new_tokens=5, do_sample=False)
    assert torch.equal(written, model.generate(tokens, max_new_tokens=5, do_sample=False, use_cache=False))
