"""window_attention: attention over packed sequences, each query to a window or a chunk of keys of its own sequence."""

from sma_modules.ops.window_attention.op import OP, window_attention
from sma_modules.ops.window_attention.types import Activation, Bias

__all__ = ["OP", "Activation", "Bias", "window_attention"]
