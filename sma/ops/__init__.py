"""Pure tensor functions, each in a folder with a reference and an eager backend."""

from sma.ops.backend import Op, operations, using
from sma.ops.compress import compress
from sma.ops.extract import extract
from sma.ops.segment_sum import segment_sum

__all__ = ["Op", "compress", "extract", "operations", "segment_sum", "using"]
