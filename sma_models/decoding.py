"""The name of :mod:`sma_models.inference` in 0.1.0."""

from sma_models.inference import Decoder, Prefilled, Prefiller, prefill

Reader = Prefiller

__all__ = ["Decoder", "Prefilled", "Prefiller", "Reader", "prefill"]
