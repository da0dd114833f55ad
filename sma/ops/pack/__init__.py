"""pack: from a decision to the packed view that every operation works on."""

from sma.ops.pack.op import OP, pack
from sma.ops.pack.types import PackedRows

__all__ = ["OP", "PackedRows", "pack"]
