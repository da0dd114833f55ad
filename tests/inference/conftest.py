"""Engines and prefill as on a CUDA device, and the model of the engines."""

from __future__ import annotations

import pytest

from sma_models.inference.fixed_capacity import why_not_fixed
from sma_models.language_model import LanguageModel
from tests.inference.engines import byte_model
from tests.inference.replayed import Replayed


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    return byte_model()


@pytest.fixture
def replaying(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks run as on a CUDA device."""
    for module in ("captured_chunks", "batch_prefiller"):
        monkeypatch.setattr(f"sma_models.inference.{module}.CapturedFunction", Replayed)
    monkeypatch.setattr("sma_models.inference.prefiller.why_uncaptured", lambda model, capture: why_not_fixed(model))
