"""compress: bring the active tokens of every sequence together, in order (paper, section 3.1).

The inverse is :func:`sma.ops.extract.extract`; each is the other's gradient, and both only move data.
"""

from sma.ops.compress.op import OP, compress, compress_through

__all__ = ["OP", "compress", "compress_through"]
