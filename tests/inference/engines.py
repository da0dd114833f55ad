"""A tiny language model of bytes, and engines whose rounds a test runs by hand."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor

from sma_models.inference.engine import Engine
from sma_models.inference.generation import generate
from sma_models.inference.limits import EngineLimits
from sma_models.inference.messages import (
    Event,
    GenerationRequest,
    RequestFailed,
    RequestOptions,
    SequenceFinished,
    TokenGenerated,
)
from sma_models.inference.sampling import Sampling
from sma_models.language_model import LanguageModel
from tests.models.tiny import tiny

SMALL = EngineLimits(slots=4, queue=60, quantum=5, prefill_chunk=16)


def byte_model(name: str = "seqboat_small_lm") -> LanguageModel:
    """A tiny model that activates some tokens and not others, in double precision: rounding decides nothing.

    Its head is one of its own: with the embedding as its head, an untrained model repeats itself.
    """
    model: LanguageModel = tiny(name, vocab_size=256, tie_embeddings=False).double()
    return model


def continued(model: LanguageModel, prompt: bytes, count: int, chunk: int = SMALL.prefill_chunk) -> bytes:
    """What ``generate`` returns for a prompt, taking the most likely byte."""
    tokens = generate(model, torch.tensor([list(prompt)]), count, temperature=0, prefill_chunk=chunk)
    return bytes(tokens[0].tolist())


def tokens_of(*texts: bytes) -> Tensor:
    return torch.tensor([list(text) for text in texts])


@dataclass
class Asked:
    """A submitted request, and its events."""

    request: GenerationRequest
    events: list[Event] = field(default_factory=list)

    def written(self, number: int = 0) -> bytes:
        return bytes(e.token for e in self.events if isinstance(e, TokenGenerated) and e.sequence == number)

    @property
    def finished(self) -> int:
        return sum(isinstance(e, SequenceFinished) for e in self.events)

    @property
    def failed(self) -> str | None:
        return next((e.message for e in self.events if isinstance(e, RequestFailed)), None)


def ask(
    engine: Engine,
    prompt: bytes,
    max_tokens: int = 8,
    *,
    n: int = 1,
    temperature: float = 0.0,
    others: Sequence[bytes] = (),
    **options: Any,
) -> Asked:
    """Submit a request for ``n`` sequences after a prompt, and as many after each of the ``others``."""
    asked: list[Asked] = []
    drawn = [Sampling(temperature, 1.0, Random(f"{prompt!r}/{i}")) for i in range(n)]
    request = GenerationRequest(
        RequestOptions(max_tokens=max_tokens, **options),
        [(each, drawn) for each in (prompt, *others)],
        lambda events: asked[0].events.extend(events),
    )
    asked.append(Asked(request))
    engine.submit(request)
    return asked[0]


def rounds(engine: Engine, most: int = 5000) -> int:
    """Run rounds until no request is left; how many."""
    for count in range(most):
        if not engine.in_flight:
            return count
        engine.round()
    raise AssertionError(f"not done after {most} rounds")


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether a condition becomes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True
