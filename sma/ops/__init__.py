"""Pure tensor functions, each in a folder with a reference and an eager backend."""

from sma.ops.backend import Op, operations, using

__all__ = ["Op", "operations", "using"]
