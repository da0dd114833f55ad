"""Bringing the rows of one expert together, and back, without waiting for the device.

Only gathers, also in the backward pass: nothing is added atomically, so results are the same bits every time.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op, without_autocast
from sma_modules.ops.expert_order.order import ExpertOrder

__all__ = ["COMBINE", "DISPATCH", "ORDER", "ExpertOrder", "combine", "dispatch", "order_by_expert"]

ORDER = Op("expert_order")
DISPATCH = Op("expert_dispatch")
COMBINE = Op("expert_combine")


def order_by_expert(choice: Int[Tensor, "tokens top_k"], n_experts: int) -> ExpertOrder:
    """Sort the entries of ``choice`` by expert; tokens of one expert keep their order.

    Args:
        choice: ``(T, k)`` int64 expert numbers in 0..E-1.
        n_experts: E.

    Raises:
        ShapeError: ``choice`` is not two-dimensional.

    Example:
        >>> import torch
        >>> order = order_by_expert(torch.tensor([[2, 0], [0, 1]]), 3)
        >>> order.order.tolist(), order.counts.tolist()
        ([1, 2, 3, 0], [2, 1, 1])
    """
    if choice.dim() != 2 or choice.is_floating_point():
        raise ShapeError(f"order_by_expert: choice must be (T, k) integers, got {choice.dtype} {tuple(choice.shape)}")
    order: ExpertOrder = ORDER(choice, n_experts)
    return order


def dispatch(x: Float[Tensor, "tokens d"], order: ExpertOrder) -> Float[Tensor, "rows d"]:
    """``x (T, D)`` to rows sorted by expert ``(T * k, D)``, each token k times.

    Raises:
        ShapeError: ``x`` does not hold the tokens that were sorted.
    """
    if x.dim() != 2 or x.shape[0] * order.top_k != order.order.shape[0]:
        raise ShapeError(
            f"dispatch: x must be (T, D) with T = {order.order.shape[0] // order.top_k} tokens, got {tuple(x.shape)}"
        )
    with without_autocast(x.device):
        rows: Tensor = DISPATCH(x, order)
    return rows


def combine(
    rows: Float[Tensor, "rows d"], weight: Float[Tensor, "tokens top_k"], order: ExpertOrder
) -> Float[Tensor, "tokens d"]:
    """Weighted sum over each token's experts: ``rows (T * k, D)`` and ``weight (T, k)`` to ``(T, D)``.

    In the dtype of ``rows``, also under autocast (which on a GPU would add up in float32 and stay there).

    Raises:
        ShapeError: ``rows`` or ``weight`` do not fit what was sorted.
    """
    n_rows = order.order.shape[0]
    if rows.dim() != 2 or rows.shape[0] != n_rows or tuple(weight.shape) != (n_rows // order.top_k, order.top_k):
        raise ShapeError(
            f"combine: rows must be ({n_rows}, D) and weight ({n_rows // order.top_k}, {order.top_k}), got "
            f"{tuple(rows.shape)} and {tuple(weight.shape)}"
        )
    with without_autocast(rows.device):
        y: Tensor = COMBINE(rows, weight, order)
    return y


from sma_modules.ops.expert_order import eager, reference, triton_backend  # noqa: E402,F401  (registers the backends)
