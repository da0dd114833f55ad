"""gau_inputs: queries, keys, values and gate of a gated attention unit, from its one projection."""

from sma_modules.ops.gau_inputs.op import OP, gau_inputs

__all__ = ["OP", "gau_inputs"]
