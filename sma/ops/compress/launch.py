"""Launches of the kernels of compress as operators, and its gradient.

Both directions are gathers: the packed view knows the rows of the tokens as well as the tokens of the rows.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from sma.ops.compress.triton_kernel import add_kernel, take_kernel
from sma.ops.kernel import cdiv, kernel, next_power_of_2
from sma.ops.packed import Packed
from sma.transforms import once_differentiable

ELEMENTS = 4096
"""Numbers that a program moves at a time."""
WARPS = 4


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
    return _Compress.apply(x, packed.index, packed.row)  # type: ignore[no-any-return,no-untyped-call]


def compress(x: Tensor, packed: Packed) -> Tensor:
    """See :func:`sma.ops.compress.compress`."""
    return compress_through(x, packed)[0]
