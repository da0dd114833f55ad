"""expert_matmul: every row times the matrix of its own expert.

The router stays outside: a mixture is ``choose_experts``, ``order_by_expert``, ``dispatch``, ``expert_matmul``,
``activate``, ``expert_matmul``, ``combine``. Nothing is dropped and rows are only gathered, in both directions, so
results are deterministic and a token's result does not depend on the other tokens (up to the rounding of a matrix
product of another size).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op, without_autocast

__all__ = ["OP", "expert_matmul"]

OP = Op("expert_matmul")


def expert_matmul(
    x: Float[Tensor, "rows d_in"],
    weight: Float[Tensor, "experts d_in d_out"],
    counts: Int[Tensor, " experts"],
    ends: Int[Tensor, " experts"] | None = None,
) -> Float[Tensor, "rows d_out"]:
    """Multiply rows that are sorted by expert with their experts' matrices.

    Args:
        x: ``(R, d_in)``: first the rows of expert 0, then those of expert 1, and so on.
        weight: ``(E, d_in, d_out)`` in the dtype of ``x``.
        counts: ``(E,)`` integers, the rows of each expert, R in total. On an accelerator nobody looks (that would wait
            for the device): rows beyond the total then go to the last expert, counts beyond R end at R.
        ends: ``(E,)`` int32, the running sum of ``counts`` where it is at hand (``ExpertOrder.ends``).

    Returns:
        ``(R, d_out)`` in the dtype of ``x``, also under autocast. Experts without rows get a zero gradient.

    Raises:
        ShapeError: sizes or dtypes do not fit.

    Example:
        >>> import torch
        >>> x, weight = torch.ones(3, 2), torch.stack([torch.eye(2), 5 * torch.eye(2)])
        >>> expert_matmul(x, weight, torch.tensor([1, 2])).tolist()
        [[1.0, 1.0], [5.0, 5.0], [5.0, 5.0]]
    """
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[1] or x.dtype != weight.dtype:
        raise ShapeError(
            f"expert_matmul: x (R, d_in) and weight (E, d_in, d_out) must agree in d_in and dtype, got {x.dtype} "
            f"{tuple(x.shape)} and {weight.dtype} {tuple(weight.shape)}"
        )
    if tuple(counts.shape) != (weight.shape[0],) or counts.is_floating_point():
        raise ShapeError(
            f"expert_matmul: counts must be {weight.shape[0]} integers, one per expert, got {counts.dtype} "
            f"{tuple(counts.shape)}"
        )
    if ends is not None and (ends.shape != counts.shape or ends.dtype != torch.int32):
        raise ShapeError(
            f"expert_matmul: ends must be int32 of shape {tuple(counts.shape)}, got {ends.dtype} {tuple(ends.shape)}"
        )
    looking = counts.device.type == "cpu" and not torch.compiler.is_compiling()
    if looking and (int(counts.sum()) != x.shape[0] or bool((counts < 0).any())):
        raise ShapeError(
            f"expert_matmul: counts must be 0 or more and add up to the {x.shape[0]} rows of x, got {counts.tolist()}"
        )
    with without_autocast(x.device):
        out: Tensor = OP(x, weight, counts, ends)
    return out


from sma_modules.ops.expert_matmul import eager, grouped, reference  # noqa: E402,F401  (registers the backends)
