"""Finds the classes of this model in the package sparse-modular-activation, extra "hf"."""

from sma_models.hf import SMAByteTokenizer, SMAConfig, SMAForCausalLM, SMAForSequenceClassification

__all__ = ["SMAByteTokenizer", "SMAConfig", "SMAForCausalLM", "SMAForSequenceClassification"]
