"""combine: all that follows a sparse module in one pass."""

from sma.ops.combine.op import OP, combine
from sma.ops.combine.types import Activation, Finish, Terms

__all__ = ["OP", "Activation", "Finish", "Terms", "combine"]
