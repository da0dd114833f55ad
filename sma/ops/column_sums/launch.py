"""Launches of the kernel of column_sums as an operator: sums over the rows of a matrix, in at most two launches."""

from __future__ import annotations

import torch
from torch import Tensor

from sma.ops.column_sums.triton_kernel import sum_kernel
from sma.ops.kernel import cdiv, kernel

BLOCK_R, BLOCK_D = 128, 32
WARPS = 8
MOST_ROWS = 256
"""The most rows that one program adds up alone; more rows are shared by several programs."""
PROGRAMS = 8 * 132
"""About how many programs there are then: all that run at once on an H100."""


def _fake(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[1], dtype=dtype)


@kernel("column_sums", fake=_fake)
def column_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``(D,)`` in ``dtype``: the sum of the rows of a contiguous ``x (R, D)``."""
    rows, d = x.shape
    if not d:
        return _fake(x, dtype)
    if rows > MOST_ROWS:
        shares = max(1, PROGRAMS // cdiv(d, BLOCK_D))
        each = cdiv(cdiv(rows, min(shares, MOST_ROWS)), BLOCK_R) * BLOCK_R
        x = _sums(x, each, torch.float32)
    return _sums(x, max(1, cdiv(x.shape[0], BLOCK_R)) * BLOCK_R, dtype).view(d)


def _sums(x: Tensor, each: int, dtype: torch.dtype) -> Tensor:
    """``(R / each, D)``: the sums of ``each`` rows, rounded up; one row of zeros where there are none."""
    rows, d = x.shape
    programs = max(1, cdiv(rows, each))
    out = x.new_empty(programs, d, dtype=dtype)
    grid = (programs, cdiv(d, BLOCK_D))
    sum_kernel[grid](x, out, rows, each, D=d, BLOCK_R=BLOCK_R, BLOCK_D=BLOCK_D, num_warps=WARPS)
    return out
