"""gau_inputs: what a gated attention unit works on, from its one projection."""

from sma_modules.ops.gau_inputs.op import OP, gau_inputs

__all__ = ["OP", "gau_inputs"]
