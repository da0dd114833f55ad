"""expert_routing: from a router's logits to the experts of each token, their weights, and the means for the losses."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op
from sma.ops.kernel import why_not_triton_on
from sma_modules.ops.expert_routing.choice import Choice

__all__ = ["OP", "Choice", "choose_experts"]

OP = Op("expert_routing")
MAX_EXPERTS = 1024


def choose_experts(logits: Float[Tensor, "tokens experts"], top_k: int, renormalise: bool) -> Choice:
    """The ``top_k`` most probable experts under ``p = softmax(logits)``; at ties the first ones.

    Args:
        logits: ``(T, E)`` in float32 or float64: rounding decides who is chosen.
        top_k: k.
        renormalise: divide the weights of each token by their sum.

    Raises:
        ShapeError: ``logits`` is not two-dimensional, or k is not in 1..E.

    Example:
        >>> choice = choose_experts(torch.tensor([[0.0, 3.0, 1.0]]), 2, True)
        >>> choice.expert.tolist(), choice.weight.sum().item()
        ([[1, 2]], 1.0)
    """
    if logits.dim() != 2 or not 1 <= top_k <= logits.shape[1]:
        raise ShapeError(
            f"choose_experts: logits must be (T, E) with E at least top_k = {top_k} and that at least 1, got "
            f"{tuple(logits.shape)}"
        )
    choice: Choice = OP(logits, top_k, renormalise)
    return choice


def _why_not(logits: Tensor, top_k: int, renormalise: bool) -> str | None:
    if logits.shape[1] > MAX_EXPERTS:
        return f"the kernel chooses among {MAX_EXPERTS} experts at most, got {logits.shape[1]}"
    return why_not_triton_on(logits, (torch.float32,))


@OP.backend("triton", priority=10, applies=_why_not)
def _triton(logits: Tensor, top_k: int, renormalise: bool) -> Choice:
    from sma_modules.ops.expert_routing.triton_kernel import choose_experts as run

    expert, weight, probability, square = run(logits, top_k, renormalise)
    return Choice(expert, weight, probability, square)


from sma_modules.ops.expert_routing import eager, reference  # noqa: E402,F401  (registers the backends)
