"""gau_projections: the products before a gated attention unit in a step of decoding, for one token of every slot."""

from sma_modules.ops.gau_projections.op import OP, gau_projections
from sma_modules.ops.gau_projections.types import Projections

__all__ = ["OP", "Projections", "gau_projections"]
