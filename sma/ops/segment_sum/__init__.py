"""segment_sum: add up the rows of each sequence of a packed batch."""

from sma.ops.segment_sum.op import OP, segment_sum

__all__ = ["OP", "segment_sum"]
