"""router: from tokens to scores and a decision by threshold, in one pass over the tokens."""

from sma.ops.router.op import OP, routed_compress, router
from sma.ops.router.types import Compressor, Gate, Routed

__all__ = ["OP", "Compressor", "Gate", "Routed", "routed_compress", "router"]
