"""ema by the kernels of ``triton_kernel``: sizes, launches, autograd. Imported at the first use only."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sma.ops.kernel import draw_seed, kernel
from sma_modules.ops.ema import triton_kernel

BLOCK = 32
"""Channels of a program, one per thread."""
TILE = 16
"""Tokens of a tile; chunks are made of whole tiles."""
SUM_STEP = 8
FORWARD_STEP = 4
BACKWARD_STEP = 4
"""Tokens whose loads are on their way together, in multiples of 4; they take registers, twice, as the next are loaded
before these are used."""
PLACES = 512
"""Channels of four tokens each for a program of what comes before the activation."""
CHUNK = 128
"""Tokens of a chunk where nothing speaks for another size: short enough for what a bidirectional program keeps of it
to stay in the cache, long enough for the states between chunks (N / CHUNK numbers per input) to cost little."""
MINIMUM_CHUNK = 32
FORWARD_REGISTERS = 96
BACKWARD_REGISTERS = 168
"""Of a thread, as few as its states fit in: of 128 a scheduler has enough for 4 warps, of 168 for 3 and of 96 for 5."""
LARGE_FORWARD_REGISTERS = 168
LARGE_BACKWARD_REGISTERS = 255
"""The same where something leaves the window or a stream's state is kept: one or two more numbers for every state."""
WARPS_PER_PROCESSOR = 12
"""Chunks are cut short where there would be fewer than these, of 32 channels each, for a multiprocessor."""
SCHEDULERS, REGISTER_FILE = 4, 16384
"""Of a multiprocessor, and registers of one: as many programs (of one warp) are started as those are enough for."""
PROCESSORS = 132
"""Of the device, where it does not say."""


class Plan(NamedTuple):
    """How the work is cut up: ``chunks`` of ``chunk`` tokens; a grid of ``(blocks, programs)``."""

    chunk: int
    chunks: int
    blocks: int
    programs: int
    states: int

    @property
    def grid(self) -> tuple[int, int]:
        """Programs per block of channels, and blocks of channels."""
        return self.blocks, self.programs


@functools.cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def plan(x: Tensor, n_state: int, truncation: int | None, registers: int) -> Plan:
    """Sizes for ``x (B, L, D)`` and programs of so many registers. Forward and backward pass agree on the chunks."""
    processors = _processors(x.device.index or 0) if x.is_cuda else PROCESSORS
    return _plan(*x.shape, n_state, truncation, registers, processors, CHUNK, MINIMUM_CHUNK)


@functools.lru_cache(maxsize=1024)
def _plan(
    batch: int,
    length: int,
    dim: int,
    n_state: int,
    truncation: int | None,
    registers: int,
    processors: int,
    chunk: int,
    minimum: int,
) -> Plan:
    """Chunks are halved while there are too few of them to occupy the device.

    With truncation their size then moves a little, to the one whose multiple exceeds the window by the fewest tokens:
    those are taken out of every start state one by one.
    """
    blocks, wanted = -(-dim // BLOCK), processors * WARPS_PER_PROCESSOR
    while chunk > minimum and batch * blocks * -(-length // chunk) < wanted:
        chunk //= 2
    if truncation is not None and truncation < length:
        sizes = range(max(chunk * 3 // 4 // TILE, 1) * TILE, chunk * 3 // 2 + 1, TILE)
        chunk = min(sizes, key=lambda size: (-truncation % size, abs(size - chunk)))
    chunks = -(-length // chunk)
    warps = REGISTER_FILE // (32 * registers) * SCHEDULERS * processors
    programs = max(min(batch * chunks, warps // blocks), 1)
    return Plan(chunk, chunks, blocks, programs, 1 << (n_state - 1).bit_length())


def _forward_fake(
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
    directions, n_state = 2 if bidirectional else 1, gamma.shape[1]
    states = 1 << (n_state - 1).bit_length()
    y = torch.empty_like(x[:, skipped:], memory_format=torch.contiguous_format)
    pre = torch.empty_like(y) if silu and save else x.new_empty(0)
    table = x.new_empty(8, directions, -(-x.shape[2] // BLOCK), states, BLOCK, dtype=torch.float32)
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
    cut = plan(x, n_state, truncation, FORWARD_REGISTERS)
    window = truncation is not None and truncation < length
    many = cut.chunks > 1
    _prepare(table, reach, (delta, alpha, beta, gamma), cut, truncation, stream)
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
            batch, length, skipped, cut.chunks, _taps(truncation, length), dropout, 1 / (1 - dropout), n_state,
            SKIPS=skipped > 0, LENGTHS=lengths is not None, MANY=many, WINDOW=window, LEAVES=leaves, STREAM=stream,
            CARRIED=hidden is not None, SILU=silu, DROPOUT=dropout > 0, SAVE=silu and save,
            DIRECTIONS=directions, DIM=dim, CHUNK=cut.chunk, N=cut.states, BLOCK=BLOCK, TILE=TILE, STEP=FORWARD_STEP,
            num_warps=1, maxnreg=LARGE_FORWARD_REGISTERS if leaves or stream else FORWARD_REGISTERS,
        )  # fmt: skip
    return outputs


def _backward_fake(
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
    dx = torch.empty_like(x)
    by_delta, by_alpha, by_beta, by_gamma, by_omega = (
        torch.empty_like(value) for value in (delta, alpha, beta, gamma, omega)
    )
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
    cut = plan(x, n_state, truncation, BACKWARD_REGISTERS)
    window = truncation is not None and truncation < length
    many, silu = cut.chunks > 1, pre.numel() > 0
    inner = dy
    if silu or dropout > 0:
        inner = _through_activation(dy, pre, seed, silu, dropout)
    sums = x
    if many:
        sums = _new_sums(x, cut, directions, 2)
        _sums(inner, sums, table, reach, None, cut, 0, gradient=True)
    if many and not window:
        _carry(sums, table, None, dim, n_state, stream=False, gradient=True)
    partial = x.new_empty(cut.programs, cut.blocks, directions * 2 * cut.states + 1, BLOCK, dtype=torch.float32)
    scratch = _scratch(x, cut, directions)
    for leaves in _launches(window):
        triton_kernel.backward[cut.grid](
            x, inner, gradients[0], scratch, sums, table, reach, omega, _or(lengths, x), partial,
            batch, length, cut.chunks, _taps(truncation, length),
            LENGTHS=lengths is not None, MANY=many, WINDOW=window, LEAVES=leaves,
            DIRECTIONS=directions, DIM=dim, CHUNK=cut.chunk, N=cut.states, BLOCK=BLOCK, TILE=TILE, STEP=BACKWARD_STEP,
            num_warps=1, maxnreg=LARGE_BACKWARD_REGISTERS if leaves else BACKWARD_REGISTERS,
        )  # fmt: skip
    triton_kernel.finish[(directions * n_state + 1, cut.blocks)](
        partial, delta, alpha, beta, gamma, *gradients[1:], cut.programs, dim, n_state, n_state**-0.5,
        DIRECTIONS=directions, N=cut.states, BLOCK=BLOCK, ROWS=32, num_warps=4,
    )  # fmt: skip
    return gradients


def _or(tensor: Tensor | None, instead: Tensor) -> Tensor:
    """Some tensor, for an argument that the kernel will not look at."""
    return instead if tensor is None else tensor


def _launches(window: bool) -> tuple[bool, ...]:
    """Values of ``LEAVES``: with a window each launch has programs for its own channels, and the others end at once.

    One kernel for both would need the registers, and the compile time, of the longer way.
    """
    return (False, True) if window else (False,)


def _taps(truncation: int | None, length: int) -> int:
    return length if truncation is None else min(truncation, length)


def _scratch(x: Tensor, cut: Plan, directions: int) -> Tensor:
    """What the programs keep of one direction until the other has come to the same token."""
    if directions == 1:
        return x
    return x.new_empty(cut.blocks * cut.programs, cut.chunk, BLOCK, dtype=torch.float32)


def _prepare(
    table: Tensor, reach: Tensor, parameters: tuple[Tensor, ...], cut: Plan, truncation: int | None, stream: bool
) -> None:
    n_state, dim = parameters[0].shape[1], reach.shape[1]
    triton_kernel.prepare[(table.shape[1], cut.blocks)](
        *parameters, table, reach, dim, n_state, n_state**-0.5, cut.chunk, truncation or 1,
        STREAM=stream, N=cut.states, BLOCK=BLOCK, TILE=TILE, num_warps=4,
    )  # fmt: skip


def _new_sums(x: Tensor, cut: Plan, directions: int, pair: int) -> Tensor:
    return x.new_empty(
        x.shape[0], cut.chunks, directions, pair, cut.blocks, cut.states, BLOCK, dtype=torch.float32
    )  # fmt: skip


def _sums(
    source: Tensor,
    sums: Tensor,
    table: Tensor,
    reach: Tensor,
    lengths: Tensor | None,
    cut: Plan,
    skipped: int,
    gradient: bool,
) -> None:
    batch, length, dim = source.shape
    triton_kernel.chunk_sums[(batch * cut.chunks, cut.blocks)](
        source, _or(lengths, source), table, reach, sums, length, skipped, cut.chunks,
        LENGTHS=lengths is not None, GRADIENT=gradient, DIRECTIONS=table.shape[1], DIM=dim, CHUNK=cut.chunk,
        N=cut.states, BLOCK=BLOCK, TILE=TILE, STEP=SUM_STEP, num_warps=1,
    )  # fmt: skip


def _through_activation(dy: Tensor, pre: Tensor, seed: Tensor | None, silu: bool, dropout: float) -> Tensor:
    """The gradient before dropout and activation, in float32."""
    batch, length, dim = dy.shape
    inner = torch.empty_like(dy, dtype=torch.float32)
    programs = batch * -(-(-(-length // 4) * dim) // PLACES)
    triton_kernel.through_activation[(programs,)](
        dy, pre, inner, _or(seed, dy), length, dim, dropout, 1 / (1 - dropout),
        SILU=silu, DROPOUT=dropout > 0, PLACES=PLACES, num_warps=4,
    )  # fmt: skip
    return inner


def _carry(
    sums: Tensor, table: Tensor, hidden: Tensor | None, dim: int, n_state: int, stream: bool, gradient: bool = False
) -> None:
    batch, chunks, directions, _, blocks, states, _ = sums.shape
    width = 64
    triton_kernel.carry[(batch * directions, -(-states * blocks * BLOCK // width))](
        sums, table, _or(hidden, sums), dim, blocks, chunks, n_state,
        STREAM=stream, CARRIED=hidden is not None, GRADIENT=gradient, DIRECTIONS=directions, N=states, BLOCK=BLOCK,
        WIDTH=width, AHEAD=8, num_warps=2,
    )  # fmt: skip


class _Average(torch.autograd.Function):
    """Keeps the input, what was before the activation, and the coefficients. Differentiable once."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        delta: Tensor,
        alpha: Tensor,
        beta: Tensor,
        gamma: Tensor,
        omega: Tensor,
        lengths: Tensor | None,
        seed: Tensor | None,
        bidirectional: bool,
        truncation: int | None,
        silu: bool,
        dropout: float,
    ) -> Tensor:
        parameters = (delta, alpha, beta, gamma, omega)
        y: Tensor
        y, pre, table, reach, _ = ema_forward(
            x, *parameters, lengths, None, seed, bidirectional, truncation, silu, dropout, True, False
        )
        ctx.save_for_backward(x, pre, table, reach, *parameters, lengths, seed)
        ctx.options = (truncation, dropout)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *saved, lengths, seed = ctx.saved_tensors
        gradients = ema_backward(dy.contiguous(), *saved, lengths, seed, *ctx.options)
        return *gradients, *([None] * 6)


def ema(
    x: Tensor,
    parameters: tuple[Tensor, ...],
    *,
    bidirectional: bool,
    truncation: int | None,
    lengths: Tensor | None,
    hidden: Tensor | None,
    stream: bool,
    activation: str,
    dropout: float,
) -> tuple[Tensor, Tensor | None]:
    """Output and the hidden state at the end, or None unless ``stream``; gradients only without."""
    x, parameters = x.contiguous(), tuple(value.contiguous() for value in parameters)
    lengths, hidden = (None if value is None else value.contiguous() for value in (lengths, hidden))
    seed = draw_seed(x.device) if dropout > 0 else None
    silu = activation == "silu"
    if not stream and torch.is_grad_enabled() and any(value.requires_grad for value in (x, *parameters)):
        y: Tensor = _Average.apply(  # type: ignore[no-untyped-call]
            x, *parameters, lengths, seed, bidirectional, truncation, silu, dropout
        )
        return y, None
    y, _, _, _, end = ema_forward(
        x, *parameters, lengths, hidden, seed, bidirectional, truncation, silu, dropout, False, stream
    )
    return y, end if stream else None
