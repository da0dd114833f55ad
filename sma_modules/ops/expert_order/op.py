"""expert_order: checks, and the choices of backends."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op, lazy
from sma.ops.kernel import FLOATS, why_not_interpreted, why_not_triton
from sma_modules.ops.expert_order import eager, reference
from sma_modules.ops.expert_order.types import ExpertOrder, OrderSignature, RowsSignature

MAX_EXPERTS = 512


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
    return ORDER.run(_order_signature(choice, n_experts), choice, n_experts)  # type: ignore[no-any-return]


def dispatch(x: Float[Tensor, "tokens d"], order: ExpertOrder) -> Float[Tensor, "rows d"]:
    """``x (T, D)`` to rows sorted by expert ``(T * k, D)``, each token k times.

    Raises:
        ShapeError: ``x`` does not hold the tokens that were sorted.
    """
    if x.dim() != 2 or x.shape[0] * order.top_k != order.order.shape[0]:
        raise ShapeError(
            f"dispatch: x must be (T, D) with T = {order.order.shape[0] // order.top_k} tokens, got {tuple(x.shape)}"
        )
    return DISPATCH.run(_dispatch_signature(x, order), x, order)  # type: ignore[no-any-return]


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
    return COMBINE.run(_combine_signature(rows, weight, order), rows, weight, order)  # type: ignore[no-any-return]


def _order_signature(choice: Tensor, n_experts: int) -> OrderSignature:
    return OrderSignature(choice.device, choice.dtype, n_experts, choice.numel() >= 2**31)


def _dispatch_signature(x: Tensor, order: ExpertOrder) -> RowsSignature:
    return RowsSignature(x.device, x.dtype, None)


def _combine_signature(rows: Tensor, weight: Tensor, order: ExpertOrder) -> RowsSignature:
    return RowsSignature(rows.device, rows.dtype, weight.dtype)


def _why_not_sorted(signature: OrderSignature) -> str | None:
    if signature.experts > MAX_EXPERTS:
        return f"the kernel sorts at most {MAX_EXPERTS} experts, got {signature.experts}"
    if signature.large:
        return "the kernel sorts fewer than 2^31 entries"
    return why_not_triton(signature.device, signature.dtype, allowed=(torch.int64, torch.int32))


def _why_not_moved(signature: RowsSignature) -> str | None:
    if signature.weight is not None and signature.weight not in FLOATS:
        return f"the kernel takes weights in float32, bfloat16, float16, got {signature.weight}"
    return why_not_triton(signature.device, signature.dtype)


_LAUNCH = "sma_modules.ops.expert_order.launch"
ORDER = Op("expert_order", _order_signature)
ORDER.register(
    "triton", lazy(_LAUNCH, "order_by_expert"), priority=10, applies=_why_not_sorted, pays=why_not_interpreted
)
ORDER.register("eager", eager.order_by_expert)
ORDER.register("reference", reference.order_by_expert, priority=90)
DISPATCH = Op("expert_dispatch", _dispatch_signature)
DISPATCH.register("triton", lazy(_LAUNCH, "dispatch"), priority=10, applies=_why_not_moved, pays=why_not_interpreted)
DISPATCH.register("eager", eager.dispatch)
DISPATCH.register("reference", reference.dispatch, priority=90)
COMBINE = Op("expert_combine", _combine_signature)
COMBINE.register("triton", lazy(_LAUNCH, "combine"), priority=10, applies=_why_not_moved, pays=why_not_interpreted)
COMBINE.register("eager", eager.combine)
COMBINE.register("reference", reference.combine, priority=90)
