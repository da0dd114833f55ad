"""The limits of an engine."""

from __future__ import annotations

from dataclasses import dataclass, fields

from sma.errors import ConfigError


@dataclass(kw_only=True, frozen=True)
class EngineLimits:
    """Bounds of the memory of an engine, and how its time is shared.

    A request for two prompts and three sequences of each has six sequences. Each has a state of constant size from the
    end of its prefill, so the sequences take at most ``slots + queue`` states, whatever their lengths.

    Attributes:
        slots: sequences that take a decoding step together.
        queue: sequences that may wait for a slot.
        quantum: tokens that a sequence generates before a waiting one takes its slot.
        prefill_chunk: tokens of a prompt that are prefilled between two decoding steps.

    Raises:
        ConfigError: a value is out of range.
    """

    slots: int = 16
    queue: int = 512
    quantum: int = 64
    prefill_chunk: int = 512

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type == "int":
                value, least = getattr(self, field.name), 0 if field.name == "queue" else 1
                if value < least:
                    raise ConfigError(f"{field.name}: must be at least {least}, got {value}")

    @property
    def capacity(self) -> int:
        """The most sequences at a time."""
        return self.slots + self.queue
