"""gau_output: everything after the attention of a gated attention unit in a step of decoding."""

from sma_modules.ops.gau_output.op import OP, gau_output

__all__ = ["OP", "gau_output"]
