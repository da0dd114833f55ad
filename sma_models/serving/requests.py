"""A request for completions, from the bytes of a body to the message for the engine. Ambiguous input is refused."""

from __future__ import annotations

import json
from random import Random
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema, field_validator

from sma_models.inference.messages import RequestOptions
from sma_models.inference.sampling import Sampling
from sma_models.serving.errors import RequestError
from sma_models.serving.limits import Limits

_ACTIVATION_TOKENS = 16_384
"""Most tokens of a request with activations: each token is some hundred bytes of JSON for every sequence."""
_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_TEXT_OR_TOKENS = {
    "oneOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}, "minItems": 1},
        {
            "type": "array",
            "items": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}, "minItems": 1},
            "minItems": 1,
        },
    ]
}
_ONE_OR_MORE_STRINGS = {
    "oneOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 4},
    ]
}


class StreamOptions(BaseModel):
    """The optional parts of a stream."""

    model_config = _STRICT

    include_usage: bool | None = None


class CompletionRequest(BaseModel):
    """The body of ``POST /v1/completions``. Fields that are None have their default.

    Attributes:
        prompt: a text, token numbers, or several of either; here as bytes. A token is a byte.
        model: name of the served model.
        max_tokens: the most tokens to generate.
        temperature: 0 always takes the most likely token.
        top_p: draw among the fewest tokens that hold this much probability.
        n: sequences for each prompt.
        stop: up to four strings that end a sequence; they are not part of its text.
        seed: the same request with the same seed gives the same sequences.
        echo: return the prompt in front of the generated text.
        logprobs: return log-probabilities of the tokens, and so many of the most likely tokens with theirs.
        stream: send the text as it is generated, as server-sent events.
        stream_options: see :class:`StreamOptions`.
        user: ignored.
        activations: return which modules each token activated; not part of OpenAI's API.
        best_of: must equal n.
        presence_penalty: must be 0.
        frequency_penalty: must be 0.
        logit_bias: must be empty.
        suffix: must be empty.
    """

    model_config = _STRICT

    prompt: Annotated[Any, WithJsonSchema(_TEXT_OR_TOKENS)]
    model: str | None = None
    max_tokens: int | None = Field(None, ge=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1)
    stop: Annotated[Any, WithJsonSchema(_ONE_OR_MORE_STRINGS)] = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=5)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    activations: bool | None = None
    best_of: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    suffix: str | None = None

    @field_validator("prompt", mode="plain")
    @classmethod
    def _prompts(cls, value: object) -> list[bytes]:
        if isinstance(value, list) and value and all(isinstance(each, str | list) for each in value):
            return [_tokens(each) for each in value]
        return [_tokens(value)]

    @field_validator("stop", mode="plain")
    @classmethod
    def _stops(cls, value: object) -> tuple[bytes, ...]:
        given: list[object] = [] if value is None else value if isinstance(value, list) else [value]
        stops = [stop for stop in given if isinstance(stop, str) and stop]
        if len(given) > 4 or len(stops) < len(given):
            raise ValueError("must be a string or up to four of them, none of them empty")
        return tuple(_encoded(stop) for stop in stops)

    @property
    def count(self) -> int:
        """Sequences for each prompt."""
        return 1 if self.n is None else self.n

    @property
    def tokens(self) -> int:
        """The most tokens to generate for each sequence; 16 is OpenAI's default."""
        return 16 if self.max_tokens is None else self.max_tokens

    def options(self) -> RequestOptions:
        """The options that all sequences of the request share, for the engine."""
        return RequestOptions(
            max_tokens=self.tokens,
            stops=self.stop or (),
            likelihoods=self.logprobs,
            prompt_likelihoods=bool(self.echo),
            activations=bool(self.activations),
        )

    def samplings(self) -> list[tuple[bytes, list[Sampling]]]:
        """The prompts, each with the sampling of its sequences."""
        temperature = 1.0 if self.temperature is None else self.temperature
        top_p = 1.0 if self.top_p is None else self.top_p
        return [
            (prompt, [Sampling(temperature, top_p, self._random(p * self.count + i)) for i in range(self.count)])
            for p, prompt in enumerate(self.prompt)
        ]

    def _random(self, number: int) -> Random:
        return Random() if self.seed is None else Random(f"{self.seed}/{number}")


def _tokens(value: object) -> bytes:
    if isinstance(value, str) and value:
        return _encoded(value)
    if isinstance(value, list) and value and all(type(token) is int and 0 <= token < 256 for token in value):
        return bytes(value)
    if value in ("", []):
        raise ValueError("must hold at least one token")
    raise ValueError("must be a string, a list of token numbers in 0..255, or a list of either")


def _encoded(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"must be text that UTF-8 can encode, got half of a surrogate pair at {error.start}"
        ) from error


def parse(body: bytes, limits: Limits, model: str) -> CompletionRequest:
    """The request in a body.

    Raises:
        RequestError: 400, the body is not JSON, has fields that are unknown or out of range, or exceeds a limit; 404,
            the request is for another model.
    """
    content = _json(body)
    if not isinstance(content, dict):
        raise RequestError(400, f"body: must be a JSON object, got {_kind(content)}")
    try:
        request = CompletionRequest.model_validate(content)
    except ValidationError as error:
        _refuse(error)
    if request.model is not None and request.model != model:
        raise RequestError(
            404, f"model: must be {model!r}, got {_short(request.model)}", param="model", code="model_not_found"
        )
    _check_supported(request)
    _check_size(request, limits)
    return request


def _json(body: bytes) -> object:
    def refuse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not a number in JSON")

    try:
        return json.loads(body.decode("utf-8"), parse_constant=refuse_constant)
    except UnicodeDecodeError as error:
        raise RequestError(400, f"body: must be UTF-8, got byte {body[error.start]:#04x} at {error.start}") from error
    except RecursionError as error:
        raise RequestError(400, "body: is nested too deeply for the JSON parser; nest it less") from error
    except ValueError as error:
        raise RequestError(400, f"body: must be JSON, got {_cut(str(error))}") from error


def _refuse(error: ValidationError) -> NoReturn:
    """Raise the first error, in the words of this API."""
    first = error.errors(include_url=False, include_context=False)[0]
    # Names may hold characters that UTF-8 cannot encode.
    names = [_cut(json.dumps(str(part))[1:-1], 40) for part in first["loc"]] or ["body"]
    place, top = ".".join(names), names[0]
    if first["type"] == "extra_forbidden":
        raise RequestError(
            400, f"{place}: is not a field of this request; leave it out", param=top, code="unknown_parameter"
        ) from error
    if first["type"] == "missing":
        raise RequestError(400, f"{place}: must be given", param=top, code="missing_required_parameter") from error
    message = first["msg"].removeprefix("Value error, ")
    raise RequestError(400, f"{place}: {message}, got {_short(first['input'])}", param=top) from error


def _check_supported(request: CompletionRequest) -> None:
    only = {
        "best_of": request.best_of in (None, request.count),
        "presence_penalty": not request.presence_penalty,
        "frequency_penalty": not request.frequency_penalty,
        "logit_bias": not request.logit_bias,
        "suffix": not request.suffix,
    }
    for name, fine in only.items():
        if not fine:
            raise RequestError(
                400,
                f"{name}: is not supported, leave it out; got {_short(getattr(request, name))}",
                param=name,
                code="unsupported_parameter",
            )
    if request.stream_options is not None and not request.stream:
        raise RequestError(400, "stream_options: must be given with stream only; leave it out", param="stream_options")


def _check_size(request: CompletionRequest, limits: Limits) -> None:
    prompt_tokens = sum(len(prompt) for prompt in request.prompt)
    sequences = len(request.prompt) * request.count
    most = min(limits.sequences, limits.capacity)
    activated = (prompt_tokens + len(request.prompt) * request.tokens) * request.count if request.activations else 0
    echoed = (prompt_tokens if request.echo else 0) * request.count if request.logprobs is not None else 0
    for param, name, value, bound in (
        ("prompt", "prompt: tokens", prompt_tokens, limits.prompt_tokens),
        ("max_tokens", "max_tokens", request.tokens, limits.max_tokens),
        ("n", "n times the number of prompts", sequences, most),
        (
            "activations",
            "activations: tokens, max_tokens of all sequences included,",
            activated,
            _ACTIVATION_TOKENS,
        ),
        ("logprobs", "logprobs: tokens of the echoed prompts of all sequences", echoed, _ACTIVATION_TOKENS),
    ):
        if value > bound:
            raise RequestError(400, f"{name} must be at most {bound}, got {value}", param=param, code="too_large")


def _kind(value: object) -> str:
    return {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")


def _short(value: object) -> str:
    """A value as JSON, abbreviated."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else f"an array of {len(value)}"
    return _cut(json.dumps(value[:80] if isinstance(value, str) else value))


def _cut(text: str, most: int = 120) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
