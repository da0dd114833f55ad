"""expert_routing: checks, and the choice of a backend."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sma.errors import ShapeError
from sma.ops.backend import Op, lazy
from sma.ops.kernel import why_not_interpreted, why_not_triton
from sma_modules.ops.expert_routing import eager, reference
from sma_modules.ops.expert_routing.types import ChosenExperts, Signature

MAX_EXPERTS = 1024


def choose_experts(logits: Float[Tensor, "tokens experts"], top_k: int, renormalise: bool) -> ChosenExperts:
    """The ``top_k`` most probable experts under ``p = softmax(logits)``; at ties the first ones.

    Args:
        logits: ``(T, E)`` in float32 or float64: rounding decides which experts are chosen.
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
    return OP.run(_signature(logits, top_k, renormalise), logits, top_k, renormalise)  # type: ignore[no-any-return]


def _signature(logits: Tensor, top_k: int, renormalise: bool) -> Signature:
    return Signature(logits.device, logits.dtype, logits.shape[1])


def _why_not_triton(signature: Signature) -> str | None:
    if signature.experts > MAX_EXPERTS:
        return f"the kernel chooses among {MAX_EXPERTS} experts at most, got {signature.experts}"
    return why_not_triton(signature.device, signature.dtype, allowed=(torch.float32,))


OP = Op("expert_routing", _signature)
OP.register(
    "triton",
    lazy("sma_modules.ops.expert_routing.launch", "choose_experts"),
    priority=10,
    applies=_why_not_triton,
    pays=why_not_interpreted,
)
OP.register("eager", eager.choose_experts)
OP.register("reference", reference.choose_experts, priority=90)
