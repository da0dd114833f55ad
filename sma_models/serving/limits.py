"""What a server takes on, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from sma.errors import ConfigError


@dataclass(kw_only=True, frozen=True)
class Limits:
    """Bounds of everything that a client can make large.

    A *sequence* is one text that is written: a request for two prompts with ``n`` 3 is six of them. Each has a state of
    constant size from the moment that its prompt is read, so the memory that sequences take is at most
    ``slots + queue`` states, whatever their lengths.

    Attributes:
        slots: sequences that take a step together, the batch.
        queue: sequences that wait for a slot. When slots and queue are full, requests get a 429.
        quantum: tokens that a sequence writes before one that waits takes its slot.
        prefill_chunk: tokens of a prompt that are read between two steps.
        prompt_tokens: longest prompt, all prompts of a request together.
        max_tokens: the most that ``max_tokens`` may be.
        sequences: most sequences of one request.
        body_bytes: largest body of a request.
        head_bytes: largest head (request line and header fields) of a request.
        connections: most connections at a time.
        head_seconds: time for a connection to send the head of a request.
        body_seconds: time for the body of a request.
        seconds: time for a whole request, waiting and sending included.
        drain_seconds: after SIGTERM, time for the requests that are there to finish.

    Raises:
        ConfigError: a value is out of range.
    """

    slots: int = 16
    queue: int = 512
    quantum: int = 64
    prefill_chunk: int = 512
    prompt_tokens: int = 131_072
    max_tokens: int = 4096
    sequences: int = 16
    body_bytes: int = 1 << 20
    head_bytes: int = 16_384
    connections: int = 800
    head_seconds: float = 10.0
    body_seconds: float = 30.0
    seconds: float = 600.0
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name in ("queue", "drain_seconds") else 1
            if field.name.endswith("seconds"):
                if not (0 if least == 0 else 1e-3) <= value < math.inf:
                    raise ConfigError(f"{field.name}: must be a positive number of seconds, got {value}")
            elif value < least:
                raise ConfigError(f"{field.name}: must be at least {least}, got {value}")

    @property
    def capacity(self) -> int:
        """The most sequences at a time."""
        return self.slots + self.queue
