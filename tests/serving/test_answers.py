"""Requests, draws and answers without a server: what is refused and how, and that the chunks of a stream add up to the
whole.
"""

from __future__ import annotations

import json
import math
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sma_models.inference.generation import sample
from sma_models.inference.messages import Event, RequestFailed, SequenceFinished, TokenGenerated
from sma_models.inference.sampling import Likelihood, Sampling, draw, likelihoods
from sma_models.inference.stop_strings import possible_stop_length, stop_length
from sma_models.serving.errors import RequestError
from sma_models.serving.limits import Limits
from sma_models.serving.requests import CompletionRequest, parse
from sma_models.serving.responses import Completion
from sma_models.serving.text import token_name

LIMITS = Limits(slots=4, queue=9, prompt_tokens=50, max_tokens=20, sequences=6)


def parsed(**content: Any) -> CompletionRequest:
    return parse(json.dumps(content).encode(), LIMITS, "tiny")


def refused(body: bytes) -> RequestError:
    with pytest.raises(RequestError) as error:
        parse(body, LIMITS, "tiny")
    content = error.value.content()
    assert list(content["error"]) == ["message", "type", "param", "code"]
    assert content["error"]["type"] == "invalid_request_error"
    assert len(error.value.message) < 400
    json.dumps(content, allow_nan=False, ensure_ascii=False).encode()
    return error.value


@pytest.mark.parametrize(
    ("content", "param", "message"),
    [
        ({}, "prompt", "prompt: must be given"),
        ({"prompt": None}, "prompt", "prompt: must be a string, a list of token numbers in 0..255"),
        ({"prompt": ""}, "prompt", 'prompt: must hold at least one token, got ""'),
        ({"prompt": []}, "prompt", "prompt: must hold at least one token, got an array of 0"),
        ({"prompt": ["a", ""]}, "prompt", "prompt: must hold at least one token"),
        ({"prompt": [1, 256]}, "prompt", "prompt: must be a string"),
        ({"prompt": [1, -1]}, "prompt", "prompt: must be a string"),
        ({"prompt": [1, True]}, "prompt", "prompt: must be a string"),
        ({"prompt": [1, 2.0]}, "prompt", "prompt: must be a string"),
        ({"prompt": ["a", 1]}, "prompt", "prompt: must be a string"),
        ({"prompt": [[["a"]]]}, "prompt", "prompt: must be a string"),
        ({"prompt": {"a": 1}}, "prompt", "got an object"),
        ({"prompt": "x" * 51}, "prompt", "prompt: tokens must be at most 50, got 51"),
        ({"prompt": ["x" * 30, "y" * 30]}, "prompt", "prompt: tokens must be at most 50, got 60"),
        (
            {"prompt": "a", "max_tokens": -1},
            "max_tokens",
            "max_tokens: Input should be greater than or equal to 0",
        ),
        ({"prompt": "a", "max_tokens": 21}, "max_tokens", "max_tokens must be at most 20, got 21"),
        ({"prompt": "a", "max_tokens": 1e30}, "max_tokens", "max_tokens: Input should be a valid integer"),
        ({"prompt": "a", "max_tokens": "9"}, "max_tokens", "max_tokens: Input should be a valid integer"),
        (
            {"prompt": "a", "temperature": -0.1},
            "temperature",
            "temperature: Input should be greater than or equal",
        ),
        ({"prompt": "a", "temperature": 2.1}, "temperature", "temperature: Input should be less than or equal to 2"),
        ({"prompt": "a", "temperature": True}, "temperature", "temperature: Input should be a valid number, got true"),
        ({"prompt": "a", "top_p": 0}, "top_p", "top_p: Input should be greater than 0, got 0"),
        ({"prompt": "a", "n": 0}, "n", "n: Input should be greater than or equal to 1, got 0"),
        ({"prompt": "a", "n": 7}, "n", "n times the number of prompts must be at most 6, got 7"),
        ({"prompt": ["a", "b"], "n": 4}, "n", "n times the number of prompts must be at most 6, got 8"),
        ({"prompt": "a", "stop": ["a"] * 5}, "stop", "stop: must be a string or up to four of them"),
        ({"prompt": "a", "stop": ""}, "stop", "stop: must be a string or up to four of them"),
        ({"prompt": "a", "stop": [1]}, "stop", "stop: must be a string or up to four of them"),
        ({"prompt": "a", "seed": 2**63}, "seed", "seed: Input should be less than"),
        ({"prompt": "a", "echo": 1}, "echo", "echo: Input should be a valid boolean, got 1"),
        ({"prompt": "a", "stream": "yes"}, "stream", 'stream: Input should be a valid boolean, got "yes"'),
        ({"prompt": "a", "logprobs": 6}, "logprobs", "logprobs: Input should be less than or equal to 5, got 6"),
        ({"prompt": "a", "logprobs": True}, "logprobs", "logprobs: Input should be a valid integer, got true"),
        (
            {"prompt": "a", "stream_options": {}},
            "stream_options",
            "stream_options: must be given with stream only; leave it out",
        ),
        (
            {"prompt": "a", "stream_options": {"x": 1}},
            "stream_options",
            "stream_options.x: is not a field of this request; leave it out",
        ),
        ({"prompt": "a", "best_of": 2}, "best_of", "best_of: is not supported, leave it out; got 2"),
        ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty", "presence_penalty: is not supported"),
        ({"prompt": "a", "frequency_penalty": -1}, "frequency_penalty", "frequency_penalty: is not supported"),
        ({"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias", "logit_bias: is not supported"),
        ({"prompt": "a", "suffix": "b"}, "suffix", 'suffix: is not supported, leave it out; got "b"'),
        ({"prompt": "a", "max_token": 5}, "max_token", "max_token: is not a field of this request; leave it out"),
        ({"prompt": "a", "x" * 5000: 5}, "x" * 37 + "...", "is not a field of this request"),
        (
            {"prompt": "\ud800"},
            "prompt",
            "prompt: must be text that UTF-8 can encode, got half",
        ),
        ({"prompt": "a", "stop": "a\udfff"}, "stop", "half of a surrogate pair at 1"),
        ({"prompt": "a", "suffix": "\ud800"}, "suffix", "suffix: is not supported"),
        ({"prompt": "a", "\ud800": 1}, None, "Input should be a valid string"),
        ({"prompt": "a", "stream": True, "stream_options": {"\ud800": 1}}, None, "Input should be a valid string"),
        ({"prompt": "a", "user": {"deep": [1]}}, "user", "user: Input should be a valid string, got an object"),
    ],
)
def test_fields_that_are_refused(content: dict[str, Any], param: str | None, message: str) -> None:
    error = refused(json.dumps(content).encode())
    assert error.status == 400
    assert message in error.message
    assert error.param == param or param is None


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "body: must be JSON, got Expecting value"),
        (b"{", "body: must be JSON"),
        (b"null", "body: must be a JSON object, got null"),
        (b"[]", "body: must be a JSON object, got an array"),
        (b'"a"', "body: must be a JSON object, got a string"),
        (b"3", "body: must be a JSON object, got a number"),
        (b'{"prompt": "\xff"}', "body: must be UTF-8, got byte 0xff at 12"),
        (b'{"prompt": "a", "temperature": NaN}', "NaN is not a number in JSON"),
        (b'{"prompt": "a", "temperature": -Infinity}', "-Infinity is not a number in JSON"),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature: Input should be a finite number"),
        (b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}", "body: must be JSON, got Exceeds the limit"),
        (b"[" * 200_000, "body: is nested too deeply for the JSON parser; nest it less"),
        (b'{"prompt":' * 100_000, "body: is nested too deeply for the JSON parser; nest it less"),
        (b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}", "prompt: must "),
        ('{"prompt": "a"}'.encode("utf-16"), "body: must be UTF-8"),
    ],
)
def test_bodies_that_are_refused(body: bytes, message: str) -> None:
    error = refused(body)
    assert error.status == 400
    assert message in error.message


def test_another_model_is_not_there() -> None:
    error = refused(b'{"prompt": "a", "model": "gpt"}')
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.sampled_from(sorted(CompletionRequest.model_fields))


@given(st.dictionaries(FIELDS | st.text(max_size=5), JSON, max_size=6))
def test_whatever_the_fields_hold(content: dict[str, Any]) -> None:
    for body in (content, {"prompt": "a", **content}):
        try:
            request = parse(json.dumps(body).encode(), LIMITS, "tiny")
        except RequestError as error:
            assert error.status in (400, 404)  # noqa: PT017
            json.dumps(error.content(), allow_nan=False, ensure_ascii=False).encode()
        else:
            assert request.prompt
            assert request.options().max_tokens <= LIMITS.max_tokens


@given(st.binary(max_size=40))
def test_whatever_the_body_holds(body: bytes) -> None:
    with pytest.raises(RequestError) as error:
        parse(body, LIMITS, "tiny")
    assert error.value.status == 400


def test_every_form_of_a_prompt() -> None:
    assert parsed(prompt="é").prompt == [b"\xc3\xa9"]
    assert parsed(prompt=["a", "bc"]).prompt == [b"a", b"bc"]
    assert parsed(prompt=[0, 255]).prompt == [b"\x00\xff"]
    assert parsed(prompt=[[1], [2, 3]]).prompt == [b"\x01", b"\x02\x03"]
    assert parsed(prompt=["a", [98]]).prompt == [b"a", b"b"]


def test_defaults_and_nulls_are_the_same() -> None:
    fields = {name: None for name in CompletionRequest.model_fields if name != "prompt"}
    nulls, nothing = parsed(prompt="a", **fields), parsed(prompt="a")
    assert nulls.options() == nothing.options()
    assert nothing.options().max_tokens == 16
    [(prompt, [sampling])] = nothing.samplings()
    assert (prompt, sampling.temperature, sampling.top_p) == (b"a", 1.0, 1.0)
    assert parsed(prompt="a", best_of=2, n=2, logit_bias={}, presence_penalty=0, suffix="", user="me").count == 2


def test_seeds() -> None:
    def numbers(**content: Any) -> list[float]:
        return [each.random.random() for _, rows in parsed(**content).samplings() for each in rows]

    assert numbers(prompt=["a", "b"], n=2, seed=5) == numbers(prompt=["a", "b"], n=2, seed=5)
    assert len(set(numbers(prompt=["a", "b"], n=2, seed=5))) == 4
    assert numbers(prompt="a", seed=5) != numbers(prompt="a", seed=-5)
    assert numbers(prompt="a") != numbers(prompt="a")


# Drawing.


def test_draws_have_the_distribution_of_sample(generator: torch.Generator) -> None:
    logits = torch.randn(6, generator=generator)
    for temperature, top_p in ((1.0, 1.0), (0.5, 0.8), (2.0, 0.3), (1e-30, 1.0)):
        random, count = Random(0), 4000
        own = draw(logits.expand(count, -1), [Sampling(temperature, top_p, random)] * count)
        theirs = sample(logits.expand(count, -1), temperature=temperature, top_p=top_p, generator=generator)
        share = [torch.bincount(tokens, minlength=6) / count for tokens in (own, theirs)]
        assert float((share[0] - share[1]).abs().max()) < 0.04  # four standard deviations


def test_rows_are_drawn_each_in_its_own_way() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.9]]).expand(3, -1)
    rows = [Sampling(0.0, 1.0, Random(0)), Sampling(1.0, 1e-9, Random(0)), Sampling(2.0, 1.0, Random(3))]
    again = [Sampling(0.0, 1.0, Random(0)), Sampling(1.0, 1e-9, Random(0)), Sampling(2.0, 1.0, Random(3))]
    alone = [int(draw(logits[:1], [row])) for row in again]
    assert draw(logits, rows).tolist() == alone
    assert alone[:2] == [1, 1]


class _Last(Random):
    def random(self) -> float:
        return math.nextafter(1.0, 0.0)


def test_rounding_never_draws_what_has_no_probability() -> None:
    logits = torch.tensor([[1.0, 0.9, -math.inf, 0.8]])
    assert draw(logits, [Sampling(1.0, 1.0, _Last())]).tolist() == [3]
    assert draw(logits, [Sampling(1.0, 0.5, _Last())]).tolist() == [1]


def test_likelihoods_that_json_cannot_hold() -> None:
    told = likelihoods(torch.tensor([[0.0, -math.inf], [math.nan, 0.0]]), torch.tensor([1, 0]), 2)
    assert told[0] == Likelihood(-9999.0, ((0, 0.0), (1, -9999.0)))
    assert told[1].own == -9999.0


# Answers.


def written(data: bytes) -> list[Event]:
    return [TokenGenerated(0, token, Likelihood(-1.0, ((token, -1.0),))) for token in data]


def engine_events(data: bytes, stops: tuple[bytes, ...]) -> list[Event]:
    """The events of an engine for a sequence that continues with ``data``."""
    for end in range(1, len(data) + 1):
        cut = stop_length(data[:end], stops)
        if cut:
            return [*written(data[:end]), SequenceFinished(0, "stop", cut)]
    return [*written(data), SequenceFinished(0, "length")]


ALPHABET = st.lists(st.sampled_from([b"a", b"b", "é".encode(), "日".encode(), b"\xff", b"\xc3", b"\n"]), max_size=14)


@given(ALPHABET.map(b"".join), st.lists(st.text("abé\n", min_size=1, max_size=3), max_size=3), st.booleans())
def test_pieces_are_the_whole(data: bytes, stops: list[str], echo: bool) -> None:
    request = parsed(prompt="é:", stop=stops, echo=echo, max_tokens=20)
    events = engine_events(data, tuple(stop.encode() for stop in stops))
    whole = Completion(request, "tiny")
    whole.feed(events)
    said = whole.whole()["choices"][0]
    stream, texts = Completion(request, "tiny"), [""]
    for event in events:
        assert not stream.finished
        stream.feed([event])
        texts += [piece["choices"][0]["text"] for piece in stream.chunks()]
    assert stream.finished
    assert "".join(texts) == said["text"]
    # By the definition: up to the first place where a stop string is complete, without it.
    kept = bytes(e.token for e in events if isinstance(e, TokenGenerated))
    last = events[-1]
    assert isinstance(last, SequenceFinished)
    kept = kept[: len(kept) - last.stop_bytes]
    assert said["text"] == (("é:".encode() if echo else b"") + kept).decode("utf-8", "replace")
    assert said["finish_reason"] == last.reason
    assert not any(stop in said["text"][2 * echo :] for stop in stops)


def test_nothing_is_told_that_may_be_a_stop() -> None:
    stream = Completion(parsed(prompt="p", stop=["end", "\n\n"]), "tiny")
    told = []
    for event in written(b"an en\n\x41en") + written(b"d")[:1]:
        stream.feed([event])
        told.append("".join(piece["choices"][0]["text"] for piece in stream.chunks()))
    assert told == ["a", "n", " ", "", "", "en", "\nA", "", "", ""]
    stream.feed([SequenceFinished(0, "stop", 3)])
    [last] = stream.chunks()
    assert (last["choices"][0]["text"], last["choices"][0]["finish_reason"]) == ("", "stop")


def test_log_probabilities() -> None:
    completion = Completion(parsed(prompt="p", logprobs=1, stop="!"), "tiny")
    completion.feed([*written("aé!".encode()), SequenceFinished(0, "stop", 1)])
    said = completion.whole()
    assert said["choices"][0]["text"] == "aé"
    assert said["choices"][0]["logprobs"] == {
        "tokens": ["a", "bytes:\\xc3", "bytes:\\xa9"],
        "token_logprobs": [-1.0, -1.0, -1.0],
        "top_logprobs": [{"a": -1.0}, {"bytes:\\xc3": -1.0}, {"bytes:\\xa9": -1.0}],
        "text_offset": [0, 1, 1],
    }
    assert said["usage"] == {"prompt_tokens": 1, "completion_tokens": 4, "total_tokens": 5}


def test_what_the_engine_gives_up() -> None:
    completion = Completion(parsed(prompt="p"), "tiny")
    with pytest.raises(RequestError, match="no more") as error:
        completion.feed([RequestFailed("no more")])
    assert error.value.status == 500
    assert error.value.content()["error"]["type"] == "server_error"


@given(st.text("ab", max_size=8), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_held_back_is_the_longest_beginning(text: str, stops: list[str]) -> None:
    given_stops = [stop.encode() for stop in stops]
    sizes = [n for stop in given_stops for n in range(1, len(stop) + 1) if text.encode().endswith(stop[:n])]
    assert possible_stop_length(text.encode(), given_stops) == max(sizes, default=0)


def test_names_of_tokens_are_unique() -> None:
    assert len({token_name(token) for token in range(256)}) == 256
