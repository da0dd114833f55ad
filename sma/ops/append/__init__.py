"""append: put new tokens of every sequence behind the last ones that it remembers (paper, section 4)."""

from sma.ops.append.op import OP, append
from sma.ops.append.types import AppendedRows

__all__ = ["OP", "AppendedRows", "append"]
