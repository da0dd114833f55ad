"""From the events of the engine to OpenAI's completions, whole or as the objects of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from sma_models.inference.messages import (
    Event,
    PromptPrefilled,
    RequestFailed,
    SequenceFinished,
    TokenActivations,
    TokenGenerated,
)
from sma_models.inference.sampling import Likelihood
from sma_models.inference.stop_strings import possible_stop_length
from sma_models.serving.errors import RequestError
from sma_models.serving.requests import CompletionRequest
from sma_models.serving.text import IncrementalText, token_name


class CompletionChoice:
    """One sequence, as an entry of ``choices``; bytes that may begin a stop string are held back.

    Args:
        request: that it answers.
        index: of the entry.
        prompt: that it follows.

    Attributes:
        generated: tokens so far, those of a stop string included.
    """

    def __init__(self, request: CompletionRequest, index: int, prompt: bytes) -> None:
        self._request, self._index = request, index
        self._decoded = IncrementalText()
        self._held: list[TokenGenerated] = []
        self._text = ""
        self._tokens: list[tuple[int, Likelihood | None, int]] = []
        self._activations: list[dict[str, Any]] = []
        self._prefilled = 0
        self._prompt = prompt
        self._reason: str | None = None
        self.generated = 0
        if request.echo and request.logprobs is None:
            self._text = self._decoded(prompt)

    @property
    def finished(self) -> bool:
        """Whether the sequence has ended."""
        return self._reason is not None

    def feed(self, event: Event) -> None:
        """Add an event of this sequence."""
        if isinstance(event, TokenGenerated):
            self.generated += 1
            self._held.append(event)
            stops = self._request.stop or ()
            longest = max((len(stop) for stop in stops), default=0)
            tail = bytes(held.token for held in self._held[-longest:]) if longest else b""
            self._release(len(self._held) - possible_stop_length(tail, stops))
        elif isinstance(event, PromptPrefilled):
            for likelihood in event.likelihoods:
                self._add(self._prompt[self._prefilled], likelihood)
                self._prefilled += 1
        elif isinstance(event, TokenActivations):
            self._activations.append(
                {
                    "position": event.position,
                    "token": event.token,
                    "active": list(event.active),
                    "confidence": list(event.confidence),
                }
            )
        elif isinstance(event, SequenceFinished):
            self._reason = event.reason
            self._release(len(self._held) - event.stop_bytes)
            self._held.clear()
            self._text += self._decoded(b"", final=True)

    def take(self) -> dict[str, Any] | None:
        """The output since the last call, as an entry of ``choices``; None if there is none."""
        if not (self._text or self._tokens or self._activations or self._reason):
            return None
        choice: dict[str, Any] = {
            "text": self._text,
            "index": self._index,
            "logprobs": None if self._request.logprobs is None else self._logprobs(),
            "finish_reason": self._reason,
        }
        if self._request.activations:
            choice["activations"] = self._activations
        self._text, self._tokens, self._activations = "", [], []
        return choice

    def _release(self, count: int) -> None:
        for event in self._held[:count]:
            self._add(event.token, event.likelihood)
        del self._held[:count]

    def _add(self, token: int, likelihood: Likelihood | None) -> None:
        if self._request.logprobs is not None:
            self._tokens.append((token, likelihood, self._decoded.characters))
        self._text += self._decoded(bytes([token]))

    def _logprobs(self) -> dict[str, Any]:
        known = [likelihood for _, likelihood, _ in self._tokens]
        return {
            "tokens": [token_name(token) for token, _, _ in self._tokens],
            "token_logprobs": [None if each is None else each.own for each in known],
            "top_logprobs": [None if each is None else {token_name(t): lp for t, lp in each.top} for each in known]
            if self._request.logprobs
            else None,
            "text_offset": [offset for _, _, offset in self._tokens],
        }


class Completion:
    """The answer to one request."""

    def __init__(self, request: CompletionRequest, model: str) -> None:
        self._request = request
        self._frame = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        prompts = [prompt for prompt in request.prompt for _ in range(request.count)]
        self._choices = [CompletionChoice(request, i, prompt) for i, prompt in enumerate(prompts)]

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended."""
        return all(choice.finished for choice in self._choices)

    def feed(self, events: Sequence[Event]) -> None:
        """Add events.

        Raises:
            RequestError: 500, the engine gave up the request.
        """
        for event in events:
            if isinstance(event, RequestFailed):
                raise RequestError(500, event.message)
            self._choices[event.sequence].feed(event)

    def chunks(self) -> list[dict[str, Any]]:
        """The output of each sequence since the last call, as the objects of a stream."""
        usage = {"usage": None} if self.has_usage else {}
        taken = [choice.take() for choice in self._choices]
        return [{**self._frame, "choices": [choice], **usage} for choice in taken if choice is not None]

    @property
    def has_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        options = self._request.stream_options
        return options is not None and bool(options.include_usage)

    def whole(self) -> dict[str, Any]:
        """The whole answer as one object."""
        choices = [choice.take() for choice in self._choices]
        return {**self._frame, "choices": choices, "usage": self._usage()}

    def usage_chunk(self) -> dict[str, Any]:
        """The last object of a stream, which holds the usage."""
        return {**self._frame, "choices": [], "usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        prompt = sum(len(each) for each in self._request.prompt)
        generated = sum(choice.generated for choice in self._choices)
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
