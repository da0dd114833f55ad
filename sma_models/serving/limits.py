"""The limits of a server."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

from sma.errors import ConfigError
from sma_models.inference.limits import EngineLimits


@dataclass(kw_only=True, frozen=True)
class Limits(EngineLimits):
    """Bounds of every size that a client can choose, and those of the engine.

    When slots and queue are full, requests get a 429.

    Attributes:
        slots: sequences that take a decoding step together.
        queue: sequences that may wait for a slot.
        quantum: tokens that a sequence generates before a waiting one takes its slot.
        prefill_chunk: tokens of a prompt that are prefilled between two decoding steps.
        prompt_tokens: longest prompt, all prompts of a request together.
        max_tokens: the largest ``max_tokens`` of a request.
        sequences: most sequences of one request.
        body_bytes: largest body of a request.
        head_bytes: largest head (request line and header fields) of a request.
        connections: most connections at a time.
        head_seconds: time for a connection to send the head of a request.
        body_seconds: time for the body of a request.
        seconds: time for a whole request, waiting and sending included.
        drain_seconds: after SIGTERM, time for unfinished requests to finish.

    Raises:
        ConfigError: a value is out of range.
    """

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
        super().__post_init__()
        for field in fields(self):
            if field.type == "float":
                value, least = getattr(self, field.name), 0.0 if field.name == "drain_seconds" else 1e-3
                if not least <= value < math.inf:
                    raise ConfigError(f"{field.name}: must be a positive number of seconds, got {value}")

    @classmethod
    def of(cls, limits: EngineLimits) -> Limits:
        """The limits of an engine, with the defaults of a server where they say nothing about it."""
        return limits if isinstance(limits, cls) else cls(**asdict(limits))
