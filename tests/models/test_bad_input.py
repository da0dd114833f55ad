"""What a model does not take is refused before any work, with one clear error."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sma.errors import ConfigError, ShapeError, StreamingError
from sma.interfaces import Model
from sma_models.heads import Classifier, LanguageModel, Retrieval
from sma_models.hybrid import Hybrid, SublayerConfig
from sma_modules.ema import EMA
from sma_modules.ffn import FFN

BLOCK = Hybrid.Config(sublayers=(SublayerConfig(mixer=EMA.Config(n_state=2)), SublayerConfig(module=FFN.Config())))
COMMON: dict[str, Any] = {"d_model": 4, "n_layers": 1, "blocks": (BLOCK,)}


def language_model() -> Model:
    return LanguageModel.Config(**COMMON, vocab_size=5).build()


def classifier(vocab_size: int | None = 5) -> Model:
    return Classifier.Config(**COMMON, vocab_size=vocab_size, n_classes=2).build()


@pytest.mark.parametrize("build", [language_model, classifier])
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 3), r"tokens must be integers of shape \(B, L\), got torch.float32 \(2, 3\)"),
        (torch.zeros(2, 3, dtype=torch.bool), "got torch.bool"),
        (torch.zeros(3, dtype=torch.int64), r"got torch.int64 \(3,\)"),
        (torch.zeros(0, 3, dtype=torch.int64), r"at least one sequence, got \(0, 3\)"),
        (torch.full((1, 3), 5), r"tokens must lie in 0\.\.4, got 5"),
        (torch.full((1, 3), -1), r"tokens must lie in 0\.\.4, got -1"),
    ],
)
def test_tokens_that_are_none(build: Any, tokens: torch.Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        build()(tokens)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), r"values must be floats of shape \(B, L\)"),
        (torch.zeros(2, 3, 1), r"got torch.float32 \(2, 3, 1\)"),
        (torch.zeros(0, 3), "B > 0"),
        (torch.tensor([[0.0, float("nan")]]), "values must be finite"),
        (torch.tensor([[0.0, float("inf")]]), "values must be finite"),
        (torch.zeros(2, 0), r"at least one token, got \(2, 0\)"),
    ],
)
def test_values_that_are_none(values: torch.Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        classifier(None)(values)


def test_masks_that_do_not_fit() -> None:
    tokens = torch.zeros(2, 3, dtype=torch.int64)
    for valid in (torch.ones(2, 3), torch.ones(2, 2, dtype=torch.bool)):
        with pytest.raises(ShapeError, match=r"valid: must be bool of shape \(2, 3\)"):
            language_model()(tokens, valid=valid)
        with pytest.raises(ShapeError, match=r"valid: must be bool of shape \(2, 3\)"):
            classifier()(tokens, valid=valid)


def test_a_row_of_padding_is_answered() -> None:
    valid = torch.tensor([[True, True, False], [False] * 3])
    assert classifier()(torch.zeros(2, 3, dtype=torch.int64), valid=valid).logits.isfinite().all()
    assert language_model()(torch.zeros(2, 3, dtype=torch.int64), valid=valid).logits.isfinite().all()


def test_lengths_zero_and_one() -> None:
    model = language_model()
    assert model(torch.zeros(2, 0, dtype=torch.int64)).logits.shape == (2, 0, 5)
    assert model(torch.zeros(2, 1, dtype=torch.int64)).logits.shape == (2, 1, 5)


def test_models_that_read_whole_sequences_do_not_stream() -> None:
    for model in (classifier(), Retrieval.Config(**COMMON, vocab_size=5).build()):
        with pytest.raises(StreamingError, match="reads whole sequences, it does not stream"):
            model.initial_state(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 1}, "vocab_size: must be at least 2, got 1"),
        ({"vocab_size": 5, "n_layers": 0}, "n_layers: must be at least 1, got 0"),
        ({"vocab_size": 5, "blocks": ()}, r"blocks: must hold 1 to n_layers = 1 blocks, got \(\)"),
        ({"vocab_size": 5, "d_model": 0}, "d_model: must be at least 1, got 0"),
        ({"vocab_size": 5, "dropout": 1.0}, r"dropout: must lie in \[0, 1\), got 1.0"),
    ],
)
def test_sizes_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LanguageModel.Config(**{**COMMON, **options})
