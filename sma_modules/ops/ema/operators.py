"""The kernels as custom operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sma.ops.kernel import kernel
from sma_modules.ops.ema import sizes, triton_kernel
from sma_modules.ops.ema.types import EMAParameters


def _forward_fake(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gamma, bidirectional, (silu, _, save, stream), skipped = args[3], args[8], args[10:14], (*args[14:], 0)[0]
    directions, n_state = 2 if bidirectional else 1, gamma.shape[1]
    states = 1 << (n_state - 1).bit_length()
    y = torch.empty_like(x[:, skipped:], memory_format=torch.contiguous_format)
    pre = torch.empty_like(y) if silu and save else x.new_empty(0)
    table = x.new_empty(8, directions, -(-x.shape[2] // sizes.BLOCK), states, sizes.BLOCK, dtype=torch.float32)
    reach = x.new_empty(directions, x.shape[2], dtype=torch.int32)
    end = x.new_empty((x.shape[0], x.shape[2], n_state) if stream else 0, dtype=torch.float32)
    return y, pre, table, reach, end


@kernel("ema_forward", fake=_forward_fake)
def ema_forward(
    x: Tensor,
    delta: Tensor,
    alpha: Tensor,
    beta: Tensor,
    gamma: Tensor,
    omega: Tensor,
    lengths: Tensor | None,
    hidden: Tensor | None,
    seed: Tensor | None,
    bidirectional: bool,
    truncation: int | None,
    silu: bool,
    dropout: float,
    save: bool,
    stream: bool,
    skipped: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output; what was before the activation (empty unless ``save`` and ``silu``); coefficients, reach; end state.

    Args:
        x: ``(B, L, D)`` contiguous, at least one token.
        delta: ``(D | 2 D, N)`` contiguous, like ``alpha``, ``beta`` and ``gamma``.
        alpha: see ``delta``.
        beta: see ``delta``.
        gamma: see ``delta``.
        omega: ``(D,)``.
        lengths: ``(B,)`` real tokens, or None.
        hidden: ``(B, D, N)`` float32, the state that a stream begins with, or None.
        seed: ``(1,)`` of the dropout, or None without.
        bidirectional: see :func:`sma_modules.ops.ema.ema`, also for ``truncation`` and ``dropout``.
        truncation: see above.
        silu: whether SiLU follows.
        dropout: see above.
        save: whether a backward pass will follow.
        stream: whether to return the state behind the last real tokens.
        skipped: of so many tokens in front, which the lengths do not count, there is no output; only with a shorter
            truncation and without ``save``.
    """
    outputs = _forward_fake(
        x, delta, alpha, beta, gamma, omega, lengths, hidden, seed, bidirectional, truncation, silu, dropout, save,
        stream, skipped,
    )  # fmt: skip
    y, pre, table, reach, end = outputs
    batch, length, dim = x.shape
    directions, n_state = table.shape[1], gamma.shape[1]
    cut = sizes.plan(x, n_state, truncation, sizes.FORWARD_REGISTERS)
    window, many = cut.window, cut.chunks > 1
    parameters = EMAParameters(delta, alpha, beta, gamma, omega)
    _prepare(table, reach, parameters, cut, truncation or 1, stream)
    sums = x
    if many:
        sums = _new_sums(x, cut, directions, 1)
        _sums(x, sums, table, reach, lengths, cut, skipped, gradient=False)
        if not window:
            _carry(sums, table, hidden, dim, n_state, stream)
    scratch = _scratch(x, cut, directions)
    for leaves in _launches(window):
        triton_kernel.forward[cut.grid](
            x, y, pre, scratch, sums, table, reach, omega, _or(lengths, x), _or(seed, x),
            _or(hidden, x), end,
            batch, length, skipped, cut.chunks, cut.taps, dropout, 1 / (1 - dropout), n_state,
            SKIPS=skipped > 0, LENGTHS=lengths is not None, MANY=many, WINDOW=window, LEAVES=leaves, STREAM=stream,
            CARRIED=hidden is not None, SILU=silu, DROPOUT=dropout > 0, SAVE=silu and save,
            DIRECTIONS=directions, DIM=dim, CHUNK=cut.chunk, N=cut.states, BLOCK=sizes.BLOCK, TILE=sizes.TILE,
            STEP=sizes.FORWARD_STEP,
            num_warps=1, maxnreg=sizes.LARGE_FORWARD_REGISTERS if leaves or stream else sizes.FORWARD_REGISTERS,
        )  # fmt: skip
    return outputs


def _backward_fake(
    dy: Tensor, x: Tensor, pre: Tensor, table: Tensor, reach: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x)
    by_delta, by_alpha, by_beta, by_gamma, by_omega = (torch.empty_like(value) for value in args[:5])
    return dx, by_delta, by_alpha, by_beta, by_gamma, by_omega


@kernel("ema_backward", fake=_backward_fake)
def ema_backward(
    dy: Tensor,
    x: Tensor,
    pre: Tensor,
    table: Tensor,
    reach: Tensor,
    delta: Tensor,
    alpha: Tensor,
    beta: Tensor,
    gamma: Tensor,
    omega: Tensor,
    lengths: Tensor | None,
    seed: Tensor | None,
    truncation: int | None,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by x, delta, alpha, beta, gamma and omega. Arguments as those and the results of the forward pass."""
    gradients = _backward_fake(
        dy, x, pre, table, reach, delta, alpha, beta, gamma, omega, lengths, seed, truncation, dropout
    )
    batch, length, dim = x.shape
    directions, n_state = table.shape[1], gamma.shape[1]
    cut = sizes.plan(x, n_state, truncation, sizes.BACKWARD_REGISTERS)
    window, many, silu = cut.window, cut.chunks > 1, pre.numel() > 0
    inner = dy
    if silu or dropout > 0:
        inner = _through_activation(dy, pre, seed, silu, dropout)
    sums = x
    if many:
        sums = _new_sums(x, cut, directions, 2)
        _sums(inner, sums, table, reach, None, cut, 0, gradient=True)
    if many and not window:
        _carry(sums, table, None, dim, n_state, stream=False, gradient=True)
    partial = x.new_empty(cut.programs, cut.blocks, directions * 2 * cut.states + 1, sizes.BLOCK, dtype=torch.float32)
    scratch = _scratch(x, cut, directions)
    for leaves in _launches(window):
        triton_kernel.backward[cut.grid](
            x, inner, gradients[0], scratch, sums, table, reach, omega, _or(lengths, x), partial,
            batch, length, cut.chunks, cut.taps,
            LENGTHS=lengths is not None, MANY=many, WINDOW=window, LEAVES=leaves,
            DIRECTIONS=directions, DIM=dim, CHUNK=cut.chunk, N=cut.states, BLOCK=sizes.BLOCK, TILE=sizes.TILE,
            STEP=sizes.BACKWARD_STEP,
            num_warps=1, maxnreg=sizes.LARGE_BACKWARD_REGISTERS if leaves else sizes.BACKWARD_REGISTERS,
        )  # fmt: skip
    triton_kernel.finish[(directions * n_state + 1, cut.blocks)](
        partial, delta, alpha, beta, gamma, *gradients[1:], cut.programs, dim, n_state, n_state**-0.5,
        DIRECTIONS=directions, N=cut.states, BLOCK=sizes.BLOCK, ROWS=32, num_warps=4,
    )  # fmt: skip
    return gradients


def _or(tensor: Tensor | None, instead: Tensor) -> Tensor:
    """Any tensor, for an argument that the kernel does not read."""
    return instead if tensor is None else tensor


def _launches(window: bool) -> tuple[bool, ...]:
    """Values of ``LEAVES``: with a window each launch has programs for its own channels, and the others end at once.

    One kernel for both would need the registers, and the compile time, of the longer way.
    """
    return (False, True) if window else (False,)


def _scratch(x: Tensor, cut: sizes.Plan, directions: int) -> Tensor:
    """What the programs keep of one direction until the other has come to the same token."""
    if directions == 1:
        return x
    return x.new_empty(cut.blocks * cut.programs, cut.chunk, sizes.BLOCK, dtype=torch.float32)


def _prepare(
    table: Tensor, reach: Tensor, parameters: EMAParameters, cut: sizes.Plan, window: int, stream: bool
) -> None:
    """Coefficients, and how far each channel reaches back, with a ``window`` of so many tokens (1 for none)."""
    n_state, dim = parameters.gamma.shape[1], reach.shape[1]
    triton_kernel.prepare[(table.shape[1], cut.blocks)](
        *parameters[:4], table, reach, dim, n_state, n_state**-0.5, cut.chunk, window,
        STREAM=stream, N=cut.states, BLOCK=sizes.BLOCK, TILE=sizes.TILE, num_warps=4,
    )  # fmt: skip


def _new_sums(x: Tensor, cut: sizes.Plan, directions: int, pair: int) -> Tensor:
    return x.new_empty(
        x.shape[0], cut.chunks, directions, pair, cut.blocks, cut.states, sizes.BLOCK, dtype=torch.float32
    )  # fmt: skip


def _sums(
    source: Tensor,
    sums: Tensor,
    table: Tensor,
    reach: Tensor,
    lengths: Tensor | None,
    cut: sizes.Plan,
    skipped: int,
    gradient: bool,
) -> None:
    batch, length, dim = source.shape
    triton_kernel.chunk_sums[(batch * cut.chunks, cut.blocks)](
        source, _or(lengths, source), table, reach, sums, length, skipped, cut.chunks,
        LENGTHS=lengths is not None, GRADIENT=gradient, DIRECTIONS=table.shape[1], DIM=dim, CHUNK=cut.chunk,
        N=cut.states, BLOCK=sizes.BLOCK, TILE=sizes.TILE, STEP=sizes.SUM_STEP, num_warps=1,
    )  # fmt: skip


def _through_activation(dy: Tensor, pre: Tensor, seed: Tensor | None, silu: bool, dropout: float) -> Tensor:
    """The gradient before dropout and activation, in float32."""
    batch, length, dim = dy.shape
    inner = torch.empty_like(dy, dtype=torch.float32)
    programs = batch * -(-(-(-length // 4) * dim) // sizes.PLACES)
    triton_kernel.through_activation[(programs,)](
        dy, pre, inner, _or(seed, dy), length, dim, dropout, 1 / (1 - dropout),
        SILU=silu, DROPOUT=dropout > 0, PLACES=sizes.PLACES, num_warps=4,
    )  # fmt: skip
    return inner


def _carry(
    sums: Tensor, table: Tensor, hidden: Tensor | None, dim: int, n_state: int, stream: bool, gradient: bool = False
) -> None:
    batch, chunks, directions, _, blocks, states, _ = sums.shape
    width = 64
    triton_kernel.carry[(batch * directions, -(-states * blocks * sizes.BLOCK // width))](
        sums, table, _or(hidden, sums), dim, blocks, chunks, n_state,
        STREAM=stream, CARRIED=hidden is not None, GRADIENT=gradient, DIRECTIONS=directions, N=states,
        BLOCK=sizes.BLOCK, WIDTH=width, AHEAD=8, num_warps=2,
    )  # fmt: skip


def _after_fake(inputs: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    truncation, n_state = args[6:]
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

    Summed anew over the last inputs, with the ``table`` of their scan, so it carries no rounding. Rows without
    tokens, by their ``lengths`` behind the ``past``, keep their state.
    """
    end, end_fresh, end_count, history = _after_fake(
        inputs, table, lengths, hidden, fresh, count, past, truncation, n_state
    )
    batch, length, dim = inputs.shape
    cut = sizes.plan(inputs, n_state, truncation, sizes.FORWARD_REGISTERS)
    chunks, width = -(-truncation // cut.chunk), 128
    sums = inputs.new_empty(batch, chunks, cut.blocks, cut.states, sizes.BLOCK, dtype=torch.float32)
    real = inputs if lengths is None else lengths
    triton_kernel.window_sums[(batch * chunks, cut.blocks)](
        inputs, real, history, table, sums, length, past, truncation, chunks,
        LENGTHS=lengths is not None, DIM=dim, CHUNK=cut.chunk, N=cut.states, BLOCK=sizes.BLOCK, TILE=sizes.TILE,
        STEP=sizes.SUM_STEP, num_warps=1,
    )  # fmt: skip
    before = [sums if each is None else each for each in (hidden, fresh, count)]
    triton_kernel.window_end[(batch, -(-cut.blocks * cut.states * sizes.BLOCK // width))](
        sums, table, real, *before, end, end_fresh, end_count, dim, cut.blocks, chunks, n_state,
        LENGTHS=lengths is not None, CARRIED=hidden is not None, N=cut.states, BLOCK=sizes.BLOCK, WIDTH=width, AHEAD=8,
        num_warps=4,
    )  # fmt: skip
    return end, end_fresh, end_count, history
