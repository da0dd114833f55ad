"""expert_matmul: every row times the matrix of its own expert, and the activation in front of it in one with it.

The router stays outside: a mixture is ``choose_experts``, ``order_by_expert``, ``dispatch``, ``expert_matmul``,
``activated_expert_matmul``, ``combine``. Nothing is dropped and rows are only gathered, in both directions, so results
are deterministic and a token's result does not depend on the other tokens (up to the rounding of a matrix product of
another size).
"""

from sma_modules.ops.expert_matmul.op import ACTIVATED, OP, activated_expert_matmul, expert_matmul

__all__ = ["ACTIVATED", "OP", "activated_expert_matmul", "expert_matmul"]
