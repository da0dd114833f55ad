"""compress and its gradient as gathers: the packed view knows the rows of the tokens as well as the tokens of the rows.

``spread``, the gradient of compress, is extract.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from sma.ops.kernel import cdiv, kernel, next_power_of_2
from sma.ops.packed import Packed

ELEMENTS = 4096
"""Numbers that a program moves at a time."""
WARPS = 4


@triton.jit
def take_kernel(source, index, out, rows, limit, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """``out[r] = source[index[r]]``, zeros where the index is not in ``0 .. limit - 1``."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    i = tl.load(index + r, mask=r < rows, other=-1).to(tl.int64)
    there = (i >= 0) & (i < limit)
    value = tl.load(source + i[:, None] * D + d, mask=there[:, None] & (d < D), other=0)
    tl.store(out + r[:, None] * D + d, value, mask=(r < rows)[:, None] & (d < D))


@triton.jit
def add_kernel(into, index, rows_in, rows, limit, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """``into[index[r]] += rows_in[r]`` for an index without repeats."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    i = tl.load(index + r, mask=r < rows, other=-1).to(tl.int64)
    cells = ((i >= 0) & (i < limit))[:, None] & (d < D)
    place = into + i[:, None] * D + d
    more = tl.load(rows_in + r[:, None] * D + d, mask=cells, other=0).to(tl.float32)
    value = tl.load(place, mask=cells, other=0).to(tl.float32) + more
    tl.store(place, value.to(into.dtype.element_ty), mask=cells)


def blocks(rows: int, width: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and block sizes for ``rows`` rows of ``width`` numbers."""
    block_d = min(next_power_of_2(max(width, 1)), 1024)
    block_r = max(1, min(ELEMENTS // block_d, 64))
    grid = (cdiv(rows, block_r), cdiv(width, block_d))
    return grid, {"BLOCK_R": block_r, "BLOCK_D": block_d, "num_warps": WARPS}


def _take_fake(source: Tensor, index: Tensor) -> Tensor:
    return source.new_empty(index.numel(), source.shape[1])


@kernel("take_rows", fake=_take_fake)
def take(source: Tensor, index: Tensor) -> Tensor:
    """``(R, D)`` rows of a contiguous ``source (S, D)``, zeros for an index outside of it."""
    out = _take_fake(source, index)
    if out.numel():
        grid, sizes = blocks(*out.shape)
        take_kernel[grid](source, index, out, *out.shape[:1], source.shape[0], out.shape[1], **sizes)
    return out


def _add_fake(into: Tensor, index: Tensor, rows: Tensor) -> None:
    return None


@kernel("add_rows_", fake=_add_fake, mutates=("into",))
def add_(into: Tensor, index: Tensor, rows: Tensor) -> None:
    """Add ``rows (R, D)`` to rows of a contiguous ``into (S, D)``, which are all different."""
    if rows.numel():
        grid, sizes = blocks(*rows.shape)
        add_kernel[grid](into, index, rows, *rows.shape[:1], into.shape[0], rows.shape[1], **sizes)


def flat(x: Tensor, rows: int) -> Tensor:
    """``(rows, everything else)``, contiguous."""
    return x.contiguous().view(rows, prod(x.shape) // rows if rows else prod(x.shape[1:]))


class _Compress(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(index, row)
        ctx.shape = x.shape
        tokens = take(flat(x, row.numel()), index).view(index.numel(), *x.shape[2:])
        return tokens, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, through: Tensor | None) -> tuple[Tensor | None, None, None]:
        index, row = ctx.saved_tensors
        if grad is None:
            return through, None, None
        grad = flat(grad, index.numel())
        if through is None:
            return take(grad, row).view(ctx.shape), None, None
        through = through.contiguous()
        if torch.compiler.is_compiling():
            return through + take(grad, row).view(ctx.shape), None, None
        add_(through.view(row.numel(), -1), index, grad)
        return through, None, None


def compress_through(x: Tensor, packed: Packed) -> tuple[Tensor, Tensor]:
    """See :func:`sma.ops.compress.compress_through`."""
    return _Compress.apply(x, packed.index, packed.row)  # type: ignore[no-any-return]


def compress(x: Tensor, packed: Packed) -> Tensor:
    """See :func:`sma.ops.compress.compress`."""
    return compress_through(x, packed)[0]
