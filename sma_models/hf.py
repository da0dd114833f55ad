"""The stable name by which saved folders import the models of :mod:`sma_models.integrations.hf`."""

from sma_models.integrations.hf import (
    SMAByteTokenizer,
    SMACache,
    SMAConfig,
    SMAForCausalLM,
    SMAForSequenceClassification,
    export,
    from_model,
)

__all__ = [
    "SMAByteTokenizer",
    "SMACache",
    "SMAConfig",
    "SMAForCausalLM",
    "SMAForSequenceClassification",
    "export",
    "from_model",
]
