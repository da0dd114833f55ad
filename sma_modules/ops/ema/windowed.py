"""A chunk of a stream of a truncated average, by the kernels for whole sequences.

The output at t is a sum over the last K inputs, and the last K before the chunk are part of the state. So the kernels
run over these and the chunk, as over one sequence, but give nothing for the first K.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sma.ops.kernel import draw_seed, kernel
from sma_modules.ops.ema import fused, triton_kernel
from sma_modules.ops.ema.state import EMAState


def _after_fake(
    inputs: Tensor,
    table: Tensor,
    lengths: Tensor | None,
    hidden: Tensor | None,
    fresh: Tensor | None,
    count: Tensor | None,
    past: int,
    truncation: int,
    n_state: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, _, dim = inputs.shape
    end, end_fresh = (inputs.new_empty(batch, dim, n_state, dtype=torch.float32) for _ in range(2))
    return end, end_fresh, inputs.new_empty(batch, dtype=torch.int64), inputs.new_empty(batch, truncation, dim)


@kernel("ema_after_window", fake=_after_fake)
def after_window(
    inputs: Tensor,
    table: Tensor,
    lengths: Tensor | None,
    hidden: Tensor | None,
    fresh: Tensor | None,
    count: Tensor | None,
    past: int,
    truncation: int,
    n_state: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The state after ``inputs``: ``hidden``, ``fresh``, ``count`` and ``history``.

    Summed anew over the last inputs, with the ``table`` of their scan, so it carries no rounding. Rows that took
    nothing, by their ``lengths`` behind the ``past``, keep what they had.
    """
    end, end_fresh, end_count, history = _after_fake(
        inputs, table, lengths, hidden, fresh, count, past, truncation, n_state
    )
    batch, length, dim = inputs.shape
    cut = fused.plan(inputs, n_state, truncation, fused.FORWARD_REGISTERS)
    chunks, width = -(-truncation // cut.chunk), 128
    sums = inputs.new_empty(batch, chunks, cut.blocks, cut.states, fused.BLOCK, dtype=torch.float32)
    real = inputs if lengths is None else lengths
    triton_kernel.window_sums[(batch * chunks, cut.blocks)](
        inputs, real, history, table, sums, length, past, truncation, chunks,
        LENGTHS=lengths is not None, DIM=dim, CHUNK=cut.chunk, N=cut.states, BLOCK=fused.BLOCK, TILE=fused.TILE,
        STEP=fused.SUM_STEP, num_warps=1,
    )  # fmt: skip
    before = [sums if each is None else each for each in (hidden, fresh, count)]
    triton_kernel.window_end[(batch, -(-cut.blocks * cut.states * fused.BLOCK // width))](
        sums, table, real, *before, end, end_fresh, end_count, dim, cut.blocks, chunks, n_state,
        LENGTHS=lengths is not None, CARRIED=hidden is not None, N=cut.states, BLOCK=fused.BLOCK, WIDTH=width, AHEAD=8,
        num_warps=4,
    )  # fmt: skip
    return end, end_fresh, end_count, history


def windowed(
    x: Tensor,
    parameters: tuple[Tensor, ...],
    *,
    truncation: int,
    lengths: Tensor | None,
    state: EMAState | None,
    activation: str,
    dropout: float,
) -> tuple[Tensor, EMAState]:
    """See :func:`sma_modules.ops.ema.ema`; the state that comes out is summed anew, and so carries no rounding."""
    inputs, past = x.contiguous(), 0
    if state is not None and state.history is not None:
        # What is kept came in the dtype of x, so it goes back to it without loss.
        inputs, past = torch.cat([state.history.to(x.dtype), x], dim=1), truncation
    lengths = None if lengths is None else lengths.contiguous()
    parameters = tuple(each.contiguous() for each in parameters)
    seed = draw_seed(x.device) if dropout > 0 else None
    silu = activation == "silu"
    y, _, table, _, _ = fused.ema_forward(
        inputs, *parameters, lengths, None, seed, False, truncation, silu, dropout, False, False, past
    )
    had = () if state is None else (state.hidden, state.fresh, state.count)
    before = [None if each is None else each.contiguous() for each in had] or [None] * 3
    end = after_window(inputs, table, lengths, *before, past, truncation, parameters[3].shape[1])
    return y, EMAState(*end)
