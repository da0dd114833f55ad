"""``sma demo``."""

from __future__ import annotations

from sma.errors import ConfigError


def demo() -> None:
    """Train a small language model and show what it activates."""
    raise ConfigError("not there yet")
