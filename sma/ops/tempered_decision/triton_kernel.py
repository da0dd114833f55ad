"""tempered_decision in one kernel."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sma.ops.combine.triton_kernel import exp
from sma.ops.kernel import kernel

WARPS = 4


@triton.jit
def decision_kernel(
    x, weight, bias, balance, temp, live, active, confidence, D: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr
):
    """All modules of one token."""
    s = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, WIDTH)
    token = tl.load(x + s * D + d, mask=d < D, other=0.0).to(tl.float32)
    lives = tl.load(live + s) != 0
    for m in tl.static_range(M):
        off = tl.load(weight + 2 * m * D + d, mask=d < D, other=0.0).to(tl.float32)
        on = tl.load(weight + (2 * m + 1) * D + d, mask=d < D, other=0.0).to(tl.float32)
        # Two sums and not one of differences: what the other ways of running compute.
        margin = tl.sum(token * on, 0) + tl.load(bias + 2 * m + 1).to(tl.float32)
        margin -= tl.sum(token * off, 0) + tl.load(bias + 2 * m).to(tl.float32)
        margin += tl.load(balance + m).to(tl.float32)
        margin = tl.div_rn(margin, exp(tl.load(temp).to(tl.float32)))
        chance = tl.div_rn(1.0, 1.0 + exp(-margin))
        chance = tl.where(margin != margin, margin, chance)
        tl.store(confidence + s * M + m, chance)
        below = chance <= 0.5
        tl.store(active + s * M + m, lives & (below == 0))


def _fake(x: Tensor, weight: Tensor, bias: Tensor, balance: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], balance.numel())
    return x.new_empty(shape, dtype=torch.bool), x.new_empty(shape, dtype=torch.float32)


@kernel("tempered_decision", fake=_fake)
def decide(
    x: Tensor, weight: Tensor, bias: Tensor, balance: Tensor, temp: Tensor, live: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`sma.ops.tempered_decision.tempered_decision`."""
    active, confidence = _fake(x, weight, bias, balance)
    x = x.contiguous()
    decision_kernel[(x.shape[0],)](
        x, weight.contiguous(), bias, balance, temp, live, active, confidence,
        D=x.shape[1], M=balance.numel(), WIDTH=triton.next_power_of_2(x.shape[1]), num_warps=WARPS,
    )  # fmt: skip
    return active, confidence
