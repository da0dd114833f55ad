"""``generate`` writes what the library writes, in every way of searching and of batching."""

from __future__ import annotations

import copy
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    TextIteratorStreamer,
    pipeline,
)

from sma.errors import ConfigError, StreamingError
from sma_models.inference.generation import generate
from sma_models.integrations.hf import SMAByteTokenizer, SMACache, SMAForCausalLM, from_model
from sma_models.integrations.hf.modeling import OF_GENERATE
from sma_models.language_model import LanguageModel
from tests.integrations.hf.test_models import LANGUAGE_MODELS
from tests.models.tiny import inputs_of, tiny

PROMPT = torch.tensor([list(b"to be or not to be, that is the question")])
GREEDY: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}


def padded(rows: list[list[int]], filler: int) -> tuple[Tensor, Tensor]:
    """Prompts in one batch, padded on the left."""
    width = max(map(len, rows))
    tokens = torch.tensor([[filler] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return tokens, mask


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_greedy_text_is_that_of_the_library(name: str) -> None:
    plain = tiny(name)
    prompt = inputs_of(plain)
    written = from_model(plain).generate(prompt, **GREEDY)
    assert torch.equal(written, torch.cat([prompt, generate(plain, prompt, 20, temperature=0)], 1))


def test_greedy_text_after_a_prompt_of_several_chunks(plain: LanguageModel) -> None:
    prompt = torch.randint(256, (1, 4500))
    written = from_model(plain).generate(prompt, **GREEDY)
    assert torch.equal(written[:, 4500:], generate(plain, prompt, 20, temperature=0))


def test_greedy_text_in_bfloat16(plain: LanguageModel) -> None:
    plain = plain.bfloat16()
    written = from_model(plain).generate(PROMPT, **GREEDY)
    assert torch.equal(written[:, PROMPT.shape[1] :], generate(plain, PROMPT, 20, temperature=0))


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"prefill_chunk_size": 7},
        {"prompt_lookup_num_tokens": 4},
        {"num_return_sequences": 1, "return_dict_in_generate": False},
    ],
    ids=str,
)
def test_other_ways_to_the_same_text(model: SMAForCausalLM, options: dict[str, Any]) -> None:
    assert torch.equal(model.generate(PROMPT, **GREEDY, **options), model.generate(PROMPT, **GREEDY))


@pytest.mark.parametrize("seed", [0, 5], ids=["the model itself", "another model"])
@pytest.mark.parametrize("num_assistant_tokens", [1, 5])
@pytest.mark.filterwarnings("ignore:Passing `generation_config` together")
def test_assisted_text(model: SMAForCausalLM, seed: int, num_assistant_tokens: int) -> None:
    assistant = from_model(tiny("seqboat_small_lm", seed, vocab_size=256))
    assistant.generation_config.num_assistant_tokens = num_assistant_tokens
    written = model.generate(PROMPT, **GREEDY, assistant_model=assistant)
    assert torch.equal(written, model.generate(PROMPT, **GREEDY))


@pytest.mark.parametrize(
    ("filler", "options"),
    [
        (0, {}),
        (256, {}),
        (256, {"num_beams": 3}),
        (0, {"use_cache": False}),
        (7, {"prefill_chunk_size": 5}),
    ],
    ids=str,
)
def test_left_padded_prompts_are_gone_on_with_like_single_ones(
    model: SMAForCausalLM, filler: int, options: dict[str, Any]
) -> None:
    rows = [list(b"a longer beginning"), list(b"short"), list(b"x")]
    tokens, mask = padded(rows, filler)
    batch = model.generate(tokens, attention_mask=mask, **GREEDY, **options)[:, tokens.shape[1] :]
    for row, written in zip(rows, batch, strict=True):
        alone = model.generate(torch.tensor([row]), **GREEDY, **options)[0, len(row) :]
        assert torch.equal(written, alone)


def test_padding_beyond_the_vocabulary_needs_no_mask(model: SMAForCausalLM) -> None:
    tokens, mask = padded([list(b"a longer beginning"), list(b"short")], 256)
    assert torch.equal(model.generate(tokens, **GREEDY), model.generate(tokens, attention_mask=mask, **GREEDY))
    assert torch.equal(model(tokens).logits, model(tokens, attention_mask=mask).logits)


@pytest.mark.parametrize("width", [0, 5])
def test_a_finished_text_is_filled_and_disturbs_no_other(model: SMAForCausalLM, width: int) -> None:
    rows = [PROMPT[0].tolist()[width:], PROMPT[0].tolist()[::-1]]
    tokens, mask = padded(rows, 0)
    prompt = tokens.shape[1]
    written = model.generate(tokens, attention_mask=mask, **GREEDY)
    end = int(written[0, prompt + 3])
    stopped = model.generate(tokens, attention_mask=mask, **GREEDY, eos_token_id=end)
    first = int((written[0, prompt:] == end).int().argmax()) + prompt + 1
    assert torch.equal(stopped[0, :first], written[0, :first])
    assert (stopped[0, first:] == 256).all()
    assert stopped.shape[1] > first, "the other goes on"
    assert torch.equal(stopped[1], written[1, : stopped.shape[1]])


@pytest.mark.parametrize("beams", [2, 5])
def test_beams_are_those_of_a_search_without_a_cache(beams: int) -> None:
    model = from_model(tiny("seqboat_small_lm", vocab_size=256).double())
    options = {**GREEDY, "num_beams": beams, "return_dict_in_generate": True, "output_scores": True}
    prompts = torch.cat([PROMPT, PROMPT.flip(1)])
    with_cache, without = (model.generate(prompts, **options, use_cache=cached) for cached in (True, False))
    assert torch.equal(with_cache.sequences, without.sequences)
    torch.testing.assert_close(with_cache.sequences_scores, without.sequences_scores)
    # What a beam search finds has at least the probability of the greedy text, up to what it gave up on the way.
    logits = model(with_cache.sequences).logits.log_softmax(-1)[:, PROMPT.shape[1] - 1 : -1]
    total = logits.gather(-1, with_cache.sequences[:, PROMPT.shape[1] :, None]).sum((1, 2))
    torch.testing.assert_close(total / 20, with_cache.sequences_scores.double(), rtol=0, atol=1e-4)


def test_sampling(model: SMAForCausalLM) -> None:
    options: dict[str, Any] = {"max_new_tokens": 20, "do_sample": True, "top_k": 4, "num_return_sequences": 3}
    torch.manual_seed(1)
    written = model.generate(PROMPT, **options)
    torch.manual_seed(1)
    assert torch.equal(written, model.generate(PROMPT, **options, use_cache=False)), "the same draws"
    assert written.shape == (3, PROMPT.shape[1] + 20)
    logits = model(written).logits[:, PROMPT.shape[1] - 1 : -1]
    drawn = logits.gather(-1, written[:, PROMPT.shape[1] :, None])
    assert bool(((logits > drawn).sum(-1) < 4).all()), "among the four most likely"
    assert model.generate(PROMPT, **{**options, "num_beams": 3}).shape == written.shape


def test_what_generate_returns_can_be_gone_on_with(model: SMAForCausalLM) -> None:
    whole = model.generate(PROMPT, **GREEDY)
    out = model.generate(PROMPT, **{**GREEDY, "max_new_tokens": 10}, return_dict_in_generate=True, output_logits=True)
    assert isinstance(out.cache, SMACache)
    assert out.cache.get_seq_length() == PROMPT.shape[1] + 9, "the last token is not read yet"
    assert len(out.logits) == 10
    rest = model.generate(out.sequences, cache=out.cache, **{**GREEDY, "max_new_tokens": 10})
    assert torch.equal(rest, whole)


class Forced(LogitsProcessor):
    """Makes the texts those of a list, whatever the model says."""

    def __init__(self, start: int, tokens: list[int]) -> None:
        self.start, self.tokens = start, tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        column = input_ids.shape[1] - self.start
        return scores if column >= len(self.tokens) else one_hot(self.tokens[column]).expand_as(scores)


def one_hot(token: int) -> Tensor:
    """Logits of one token."""
    return torch.full((256,), -1e9).index_fill(0, torch.tensor(token), 0.0)


WAYS: list[dict[str, Any]] = [{}, {"prefill_chunk_size": 7}, {"do_sample": True, "top_k": 1}]


def read(model: SMAForCausalLM, tokens: Tensor) -> SMACache:
    """The cache of some tokens."""
    with torch.no_grad():
        cache = model(tokens, use_cache=True).cache
    assert isinstance(cache, SMACache)
    return cache


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_a_prompt_is_read_once(model: SMAForCausalLM, options: dict[str, Any], masked: bool) -> None:
    """Whatever part of it the cache has read; where nothing is left to read, the call is refused."""
    length = PROMPT.shape[1]
    mask = torch.ones_like(PROMPT)
    mask[:, :4] = 1 - int(masked)
    whole = model.generate(PROMPT, attention_mask=mask, **(GREEDY | options))
    for start in (1, 20, length - 1):
        with torch.no_grad():
            cache = model(PROMPT[:, :start], attention_mask=mask[:, :start], use_cache=True).cache
        rest = copy.deepcopy(cache)
        written = model.generate(PROMPT, attention_mask=mask, cache=cache, **(GREEDY | options))
        assert torch.equal(written, whole)
        assert cache.get_seq_length() == whole.shape[1] - 1
        # Or only the new tokens, with a mask of all.
        written = model.generate(PROMPT[:, start:], attention_mask=mask, cache=rest, **(GREEDY | options))
        assert torch.equal(written, whole[:, start:])
        assert rest.get_seq_length() == whole.shape[1] - 1
    for tokens in (PROMPT, torch.cat([PROMPT, PROMPT], 1)):
        cache = read(model, tokens)
        with pytest.raises(StreamingError, match=f"less than the prompt of {length} tokens, got one that has read"):
            model.generate(PROMPT, cache=cache, **(GREEDY | options))
        assert cache.get_seq_length() == tokens.shape[1], "as it was"


def test_speculative_decoding_begins_with_an_empty_cache(model: SMAForCausalLM) -> None:
    cache = read(model, PROMPT[:, :20])
    with pytest.raises(StreamingError, match="cache: must be empty for speculative decoding"):
        model.generate(PROMPT, cache=cache, **GREEDY, prompt_lookup_num_tokens=4)
    cache = SMACache()
    written = model.generate(PROMPT, cache=cache, **GREEDY, prompt_lookup_num_tokens=4)
    assert torch.equal(written, model.generate(PROMPT, **GREEDY))


MODES: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "top_k": 1},
    {"use_cache": False},
    {"prefill_chunk_size": 7},
    {"prompt_lookup_num_tokens": 3},
]


@pytest.mark.parametrize("options", MODES, ids=str)
def test_stop_strings(model: SMAForCausalLM, options: dict[str, Any]) -> None:
    """The text ends with the first of them, as with every model of Transformers."""
    tokenizer = SMAByteTokenizer()
    whole = model.generate(PROMPT, **GREEDY)[0].tolist()
    new = whole[PROMPT.shape[1] :]
    for byte in (0, 3, 11):  # any byte may be forced to be that of a string
        ending = "é€"  # five bytes, of which none is a character
        force = Forced(PROMPT.shape[1], [*new[:byte], *ending.encode(), *new])
        written = model.generate(
            PROMPT,
            **(GREEDY | options),
            stop_strings=["not this", ending],
            tokenizer=tokenizer,
            logits_processor=LogitsProcessorList([force]),
        )
        assert written[0].tolist() == [*PROMPT[0].tolist(), *new[:byte], *ending.encode()]


def test_stop_strings_of_a_batch_and_of_beams(model: SMAForCausalLM) -> None:
    tokenizer = SMAByteTokenizer()
    rows = torch.cat([PROMPT, PROMPT.flip(1)])
    force = Forced(PROMPT.shape[1], [65, 66, 67, 68])
    options = {"tokenizer": tokenizer, "stop_strings": "BC", "logits_processor": LogitsProcessorList([force])}
    assert (model.generate(rows, **GREEDY, **options)[:, PROMPT.shape[1] :] == torch.tensor([65, 66, 67])).all()
    beams = model.generate(rows, **GREEDY, **options, num_beams=2)[:, PROMPT.shape[1] :]
    assert (beams[:, :3] == torch.tensor([65, 66, 67])).all()
    with pytest.raises(ConfigError, match="stop_strings: must not be empty"):
        model.generate(PROMPT, **GREEDY, tokenizer=tokenizer, stop_strings=[""])
    with pytest.raises(ValueError, match="could not locate a tokenizer"):
        model.generate(PROMPT, **GREEDY, stop_strings=["a"])


def test_what_generate_keeps_for_itself_is_not_given_to_the_model(model: SMAForCausalLM) -> None:
    """Every argument that generate sets apart, whichever way of searching gets it."""
    names = set(model._extract_generation_mode_kwargs(None, dict.fromkeys(OF_GENERATE, 1), False, 1, 1))
    swallowed = {name for name in names if name not in signature(GenerationMixin._sample).parameters}
    assert swallowed == {"assistant_model", *OF_GENERATE}
    for options in MODES[:4]:
        written = model.generate(PROMPT, **(GREEDY | options), tokenizer=SMAByteTokenizer())
        assert torch.equal(written, model.generate(PROMPT, **GREEDY))


def test_a_text_can_begin_from_nothing(model: SMAForCausalLM) -> None:
    written = model.generate(**GREEDY)
    assert written[0, 0] == 10, "after a line feed, like the texts that it was trained on"
    assert torch.equal(written, model.generate(torch.tensor([[10]]), **GREEDY))


def test_a_pipeline_and_a_streamer(model: SMAForCausalLM) -> None:
    tokenizer = SMAByteTokenizer()
    text = pipeline("text-generation", model=model, tokenizer=tokenizer)("to be", **GREEDY)[0]["generated_text"]
    written = model.generate(torch.tensor([list(b"to be")]), **GREEDY)
    assert text == tokenizer.decode(written[0])
    streamer = TextIteratorStreamer(tokenizer)
    model.generate(torch.tensor([list(b"to be")]), **GREEDY, streamer=streamer)
    assert "".join(streamer) == text


def test_another_cache_is_refused(model: SMAForCausalLM) -> None:
    with pytest.raises(ConfigError, match=r"cache_implementation: must be None, .* got 'static'"):
        model.generate(PROMPT, **GREEDY, cache_implementation="static")
    with pytest.raises(ConfigError, match="has no inputs_embeds"):
        model.generate(inputs_embeds=torch.zeros(1, 3, 8), **GREEDY)
    with pytest.raises(ValueError, match="not used by the model"):
        model.generate(PROMPT, **GREEDY, no_such_option=1)


def test_a_generation_config(model: SMAForCausalLM) -> None:
    config = GenerationConfig(max_new_tokens=5, do_sample=False, repetition_penalty=1e6)
    written = model.generate(PROMPT, config)[0]
    new = written[PROMPT.shape[1] :].tolist()
    assert len({*PROMPT[0].tolist(), *new}) == len({*PROMPT[0].tolist()}) + 5, "nothing is repeated"
