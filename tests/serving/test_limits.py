"""What limits a server may have."""

from __future__ import annotations

import pytest

from sma.errors import ConfigError
from sma_models.inference.limits import EngineLimits
from sma_models.inference.messages import EngineFull, EngineStopped
from sma_models.serving.errors import refusal
from sma_models.serving.limits import Limits


def test_limits_out_of_range() -> None:
    for values, message in (
        ({"slots": 0}, "slots: must be at least 1, got 0"),
        ({"queue": -1}, "queue: must be at least 0, got -1"),
        ({"max_tokens": 0}, "max_tokens: must be at least 1, got 0"),
        ({"seconds": 0.0}, "seconds: must be a positive number of seconds, got 0.0"),
        ({"drain_seconds": float("inf")}, "drain_seconds: must be a positive number of seconds, got inf"),
    ):
        with pytest.raises(ConfigError, match=message):
            Limits(**values)


def test_the_limits_of_an_engine_are_extended() -> None:
    assert Limits.of(EngineLimits(slots=3, queue=4)) == Limits(slots=3, queue=4)
    own = Limits(slots=3, max_tokens=7)
    assert Limits.of(own) is own


def test_the_refusals_of_an_engine_are_answers_of_http() -> None:
    full, stopped = refusal(EngineFull("full")), refusal(EngineStopped("stopped"))
    assert (full.status, full.code, full.headers) == (429, "queue_full", {"Retry-After": "1"})
    assert (stopped.status, stopped.code, stopped.headers) == (503, "unavailable", {"Retry-After": "5"})
