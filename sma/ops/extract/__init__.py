"""extract: put the rows of a compressed sequence back where they came from, zeros elsewhere (paper, section 3.1)."""

from sma.ops.extract.op import OP, extract

__all__ = ["OP", "extract"]
