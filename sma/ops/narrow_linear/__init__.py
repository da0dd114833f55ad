"""narrow_linear: a linear map to a handful of outputs, in float32 at least: the logits of a router."""

from sma.ops.narrow_linear.op import OP, narrow_linear
from sma.ops.narrow_linear.types import WIDEST

__all__ = ["OP", "WIDEST", "narrow_linear"]
