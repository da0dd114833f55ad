"""ring_attention: attention of one token of every sequence to a ring of the tokens activated before it, in place."""

from sma_modules.ops.ring_attention.op import OP, ring_attention
from sma_modules.ops.ring_attention.types import Ring

__all__ = ["OP", "Ring", "ring_attention"]
