"""A small language model of bytes, plain and with the interface of Transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.utils import logging

from sma_models.integrations.hf import SMAForCausalLM, export, from_model
from sma_models.language_model import LanguageModel
from tests.models.tiny import tiny


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """No progress bars between the lines of a test report."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture
def plain() -> LanguageModel:
    """The model itself."""
    model: LanguageModel = tiny("seqboat_small_lm", vocab_size=256)
    return model


@pytest.fixture
def model(plain: LanguageModel) -> SMAForCausalLM:
    """The same model for Transformers."""
    wrapped = from_model(plain)
    assert isinstance(wrapped, SMAForCausalLM)
    return wrapped


@pytest.fixture
def folder(plain: LanguageModel, tmp_path: Path) -> Path:
    """The model as a folder."""
    return export(plain, tmp_path / "model")
