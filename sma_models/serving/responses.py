"""From what the engine tells to OpenAI's completions, whole or piece by piece."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

from sma_models.inference.sampling import Likelihood
from sma_models.inference.sequences import Activated, Event, Failed, Finished, Read, Written
from sma_models.serving.errors import RequestError
from sma_models.serving.requests import CompletionRequest
from sma_models.serving.text import Unfolding, held_back, token_name


class Choice:
    """One text, as far as it may be told.

    Args:
        request: what was asked for.
        number: of the text.
        prompt: that it follows.
    """

    def __init__(self, request: CompletionRequest, number: int, prompt: bytes) -> None:
        self._request, self._number = request, number
        self._unfolding = Unfolding()
        self._held: list[Written] = []  # may be the beginning of a stop string
        self._text = ""
        self._tokens: list[tuple[int, Likelihood | None, int]] = []
        self._activations: list[dict[str, Any]] = []
        self._read = 0
        self._prompt = prompt
        self._reason: str | None = None
        self.written = 0
        if request.echo and request.logprobs is None:
            self._text = self._unfolding(prompt)

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self._reason is not None

    def feed(self, event: Event) -> None:
        """Take notice of an event of this text."""
        if isinstance(event, Written):
            self.written += 1
            self._held.append(event)
            stops = self._request.stop or ()
            longest = max((len(stop) for stop in stops), default=0)
            tail = bytes(held.token for held in self._held[-longest:]) if longest else b""
            self._release(len(self._held) - held_back(tail, stops))
        elif isinstance(event, Read):
            for likelihood in event.likelihoods:
                self._add(self._prompt[self._read], likelihood)
                self._read += 1
        elif isinstance(event, Activated):
            self._activations.append(
                {
                    "position": event.position,
                    "token": event.token,
                    "active": list(event.active),
                    "confidence": list(event.confidence),
                }
            )
        elif isinstance(event, Finished):
            self._reason = event.reason
            self._release(len(self._held) - event.cut)
            self._held.clear()
            self._text += self._unfolding(b"", final=True)

    def take(self) -> dict[str, Any] | None:
        """What is new since the last call, as an entry of ``choices``; None if nothing is."""
        if not (self._text or self._tokens or self._activations or self._reason):
            return None
        choice: dict[str, Any] = {
            "text": self._text,
            "index": self._number,
            "logprobs": None if self._request.logprobs is None else self._logprobs(),
            "finish_reason": self._reason,
        }
        if self._request.activations:
            choice["activations"] = self._activations
        self._text, self._tokens, self._activations = "", [], []
        return choice

    def _release(self, count: int) -> None:
        for written in self._held[:count]:
            self._add(written.token, written.likelihood)
        del self._held[:count]

    def _add(self, token: int, likelihood: Likelihood | None) -> None:
        if self._request.logprobs is not None:
            self._tokens.append((token, likelihood, self._unfolding.characters))
        self._text += self._unfolding(bytes([token]))

    def _logprobs(self) -> dict[str, Any]:
        told = [likelihood for _, likelihood, _ in self._tokens]
        return {
            "tokens": [token_name(token) for token, _, _ in self._tokens],
            "token_logprobs": [None if each is None else each.own for each in told],
            "top_logprobs": [None if each is None else {token_name(t): lp for t, lp in each.top} for each in told]
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
        self._choices = [Choice(request, i, prompt) for i, prompt in enumerate(prompts)]

    @property
    def finished(self) -> bool:
        """Whether every text is."""
        return all(choice.finished for choice in self._choices)

    def feed(self, events: Sequence[Event]) -> None:
        """Take notice of events.

        Raises:
            RequestError: the engine gave the request up.
        """
        for event in events:
            if isinstance(event, Failed):
                raise RequestError(500, event.message)
            self._choices[event.sequence].feed(event)

    def pieces(self) -> list[dict[str, Any]]:
        """What is new of each text, as the objects of a stream."""
        usage = {"usage": None} if self.tells_usage else {}
        taken = [choice.take() for choice in self._choices]
        return [{**self._frame, "choices": [choice], **usage} for choice in taken if choice is not None]

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        options = self._request.stream_options
        return options is not None and bool(options.include_usage)

    def whole(self) -> dict[str, Any]:
        """Everything at once, with the usage."""
        choices = [choice.take() for choice in self._choices]
        return {**self._frame, "choices": choices, "usage": self._usage()}

    def closing(self) -> dict[str, Any]:
        """The object of a stream that tells the usage."""
        return {**self._frame, "choices": [], "usage": self._usage()}

    def _usage(self) -> dict[str, int]:
        read = sum(len(prompt) for prompt in self._request.prompt)
        written = sum(choice.written for choice in self._choices)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
