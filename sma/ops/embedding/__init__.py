"""embedding: rows of a table, in the dtype that they are needed in, and a gradient whose sums are in order."""

from sma.ops.embedding.op import OP, embedding

__all__ = ["OP", "embedding"]
