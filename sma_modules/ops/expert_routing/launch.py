"""The kernels of expert_routing as operators, and their gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sma.ops.kernel import cdiv, kernel, next_power_of_2
from sma.transforms import once_differentiable
from sma_modules.ops.expert_routing.triton_kernel import choose_backward_kernel, choose_kernel
from sma_modules.ops.expert_routing.types import ChosenExperts

# What may be tuned: tokens x experts of a program, and its warps.
CELLS = 1024
WARPS = 4


def _tile(experts: int) -> tuple[int, int]:
    """Experts, padded, and tokens of a program."""
    padded = int(next_power_of_2(experts))
    return padded, min(max(CELLS // padded, 1), 256)


def _fake_choose(logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, experts = logits.shape
    return (
        logits.new_empty(tokens, top_k, dtype=torch.int64),
        logits.new_empty(tokens, top_k),
        logits.new_empty(experts),
        logits.new_empty(()),
    )


@kernel("expert_routing", fake=_fake_choose)
def choose(logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four fields of ``ChosenExperts``.

    No two of them are views of one tensor: of such results of an autograd function the compiler (PyTorch 2.11) keeps
    the tensor, which has no gradient, and cuts the views out of that.
    """
    (tokens, experts), (padded, block) = logits.shape, _tile(logits.shape[1])
    expert, weight, probability, square = _fake_choose(logits, top_k, renormalise)
    if not tokens:
        return expert, weight, probability.zero_(), square.zero_()
    programs = cdiv(tokens, block)
    shares = logits.new_empty(programs, experts + 1)
    choose_kernel[(programs,)](
        logits.contiguous(), expert, weight, shares, tokens, experts, top_k, renormalise, padded,
        next_power_of_2(top_k), block, num_warps=WARPS,
    )  # fmt: skip
    return expert, weight, shares[:, :-1].sum(0), shares[:, -1].sum()


def _fake_backward(
    logits: Tensor, expert: Tensor, weight: Tensor, probability: Tensor, square: Tensor, renormalise: bool
) -> Tensor:
    return logits.new_empty(logits.shape)


@kernel("expert_routing_backward", fake=_fake_backward)
def choose_backward(
    logits: Tensor, expert: Tensor, weight: Tensor, probability: Tensor, square: Tensor, renormalise: bool
) -> Tensor:
    """The gradient of the logits, from those of weights, mean probabilities and mean square."""
    grad = _fake_backward(logits, expert, weight, probability, square, renormalise)
    (tokens, experts), (padded, block) = logits.shape, _tile(logits.shape[1])
    if tokens:
        choose_backward_kernel[(cdiv(tokens, block),)](
            logits.contiguous(), expert, weight.contiguous(), probability.contiguous(), square.contiguous(), grad,
            tokens, experts, expert.shape[1], renormalise, padded, block, num_warps=WARPS,
        )  # fmt: skip
    return grad


class _ChooseExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, top_k: int, renormalise: bool) -> Any:
        expert, weight, probability, square = choose(logits, top_k, renormalise)
        ctx.save_for_backward(logits, expert)
        ctx.mark_non_differentiable(expert)
        ctx.renormalise = renormalise
        return expert, weight, probability, square

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor | None, weight: Tensor, probability: Tensor, square: Tensor) -> Any:
        logits, expert = ctx.saved_tensors
        return choose_backward(logits, expert, weight, probability, square, ctx.renormalise), None, None


def choose_experts(logits: Tensor, top_k: int, renormalise: bool) -> ChosenExperts:
    """See :func:`sma_modules.ops.expert_routing.choose_experts`."""
    return ChosenExperts(*_ChooseExperts.apply(logits, top_k, renormalise))  # type: ignore[no-untyped-call]
