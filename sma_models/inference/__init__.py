"""Decoding: sequences that come, go on together a token at a time, and leave; see :class:`Decoder`."""

from sma_models.inference.decoder import Decoder
from sma_models.inference.prefiller import Prefilled, Reader, prefill

__all__ = ["Decoder", "Prefilled", "Reader", "prefill"]
