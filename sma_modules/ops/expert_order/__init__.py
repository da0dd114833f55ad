"""expert_order: bringing the rows of one expert together, and back, without synchronising with the device.

Only gathers, also in the backward pass: nothing is added atomically, so results are the same bits every time.
"""

from sma_modules.ops.expert_order.op import COMBINE, DISPATCH, ORDER, combine, dispatch, order_by_expert
from sma_modules.ops.expert_order.types import ExpertOrder

__all__ = ["COMBINE", "DISPATCH", "ORDER", "ExpertOrder", "combine", "dispatch", "order_by_expert"]
