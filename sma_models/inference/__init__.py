"""Inference: prefill of prompts, decoding in place (:class:`Decoder`), generation, and an engine for many requests."""

from sma_models.inference.decoder import Decoder
from sma_models.inference.prefiller import Prefilled, Prefiller, prefill

__all__ = ["Decoder", "Prefilled", "Prefiller", "prefill"]
