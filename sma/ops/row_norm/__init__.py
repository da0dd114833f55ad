"""row_norm: normalisation over the features of each token: layer norm, RMS norm, scale norm."""

from sma.ops.row_norm.op import OP, row_norm
from sma.ops.row_norm.types import WIDEST, RowNorm

__all__ = ["OP", "WIDEST", "RowNorm", "row_norm"]
