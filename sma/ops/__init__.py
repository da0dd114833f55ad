"""Pure tensor functions, each in a folder with a reference and an eager backend."""

from sma.ops.append import append
from sma.ops.backend import Op, operations, using
from sma.ops.combine import combine
from sma.ops.compress import compress
from sma.ops.embedding import embedding
from sma.ops.extract import extract
from sma.ops.narrow_linear import narrow_linear
from sma.ops.pack import pack
from sma.ops.router import Gate, router
from sma.ops.row_norm import RowNorm, row_norm
from sma.ops.segment_sum import segment_sum

__all__ = [
    "Gate",
    "Op",
    "RowNorm",
    "append",
    "combine",
    "compress",
    "embedding",
    "extract",
    "narrow_linear",
    "operations",
    "pack",
    "router",
    "row_norm",
    "segment_sum",
    "using",
]
