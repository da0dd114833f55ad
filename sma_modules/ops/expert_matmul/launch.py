"""The kernels of expert_matmul as operators, and their gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sma.ops.kernel import INTERPRETING, cdiv, kernel, next_power_of_2
from sma.transforms import once_differentiable
from sma_modules.ops.expert_matmul.grouped import running_ends
from sma_modules.ops.expert_matmul.triton_kernel import gradient_kernel, product_kernel

# "tf32x3" (tensor cores, about the error of float32) or "ieee" (none).
FLOAT32_PRECISION = "tf32x3"
# Row tiles that walk over the columns together, so that they find each other's data in the cache.
GROUP = 8


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth of a tile, warps that work on it, and stages of its pipeline of loads."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


def _power(n: int, low: int, high: int) -> int:
    """The power of two next above n, in low..high."""
    return int(max(low, min(high, next_power_of_2(max(n, 1)))))


def _tile(dtype: torch.dtype, m: int, n: int, k: int) -> Tile:
    """The tile for ``(m, k) @ (k, n)``: large where that keeps memory from being the limit."""
    single = dtype == torch.float32
    widest, narrow = (128, 64) if single else (256, 128)
    depth = _power(k, 16, 32 if single else 64)
    if m > 64 and n > narrow:
        return Tile(128, widest, depth, 8, 3)
    return Tile(_power(m, 16, narrow), _power(n, 16, narrow), depth, 4, 3)


def product_tile(dtype: torch.dtype, rows: int, experts: int, depth: int, cols: int) -> Tile:
    """The tile for ``(R, depth) @ (E, depth, cols)``, from the rows that an expert has on average."""
    return _tile(dtype, cdiv(rows, experts), cols, depth)


def gradient_tile(dtype: torch.dtype, rows: int, experts: int, d_in: int, d_out: int) -> Tile:
    """The tile for the gradient of the matrices, ``(d_in, rows) @ (rows, d_out)`` for each expert."""
    return _tile(dtype, d_in, d_out, cdiv(rows, experts))


def _widen(x: Tensor) -> bool:
    """Triton's interpreter cannot multiply bfloat16."""
    return INTERPRETING and x.dtype == torch.bfloat16


def _fake_product(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1 if transposed else 2])


@kernel("expert_matmul", fake=_fake_product)
def rows_times_matrices(x: Tensor, weight: Tensor, ends: Tensor, transposed: bool) -> Tensor:
    """``x (R, d_in) @ weight (E, d_in, d_out)``, or transposed ``x (R, d_out) @ weight^T``, row by row."""
    out = _fake_product(x, weight, ends, transposed)
    (rows, depth), cols, experts = x.shape, out.shape[1], weight.shape[0]
    if not depth:
        return out.zero_()
    if rows and cols:
        tile = product_tile(x.dtype, rows, experts, depth, cols)
        row_tiles = cdiv(rows, tile.rows) + experts
        product_kernel[(row_tiles * cdiv(cols, tile.cols),)](
            x.contiguous(), weight.contiguous(), ends, out, rows, row_tiles, depth, cols, transposed, experts,
            next_power_of_2(experts), tile.rows, tile.cols, tile.depth, GROUP, FLOAT32_PRECISION, _widen(x),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


def _fake_gradient(x: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], x.shape[1], grad.shape[1])


@kernel("expert_matmul_backward", fake=_fake_gradient)
def rows_times_rows(x: Tensor, grad: Tensor, ends: Tensor) -> Tensor:
    """``(E, d_in, d_out)``: for each expert ``x^T grad`` over its rows of ``x (R, d_in)`` and ``grad (R, d_out)``."""
    out = _fake_gradient(x, grad, ends)
    experts, d_in, d_out = out.shape
    if out.numel():
        tile = gradient_tile(x.dtype, x.shape[0], experts, d_in, d_out)
        gradient_kernel[(cdiv(d_in, tile.rows) * cdiv(d_out, tile.cols), experts)](
            x.contiguous(), grad.contiguous(), ends, out, x.shape[0], d_in, d_out, tile.rows, tile.cols, tile.depth,
            FLOAT32_PRECISION, _widen(x), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


class _ExpertMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Any:
        ctx.save_for_backward(x, weight, ends)
        return rows_times_matrices(x, weight, ends, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, ends = ctx.saved_tensors
        grad_x = rows_times_matrices(grad, weight, ends, True) if ctx.needs_input_grad[0] else None
        return grad_x, rows_times_rows(x, grad, ends) if ctx.needs_input_grad[1] else None, None


def expert_matmul(x: Tensor, weight: Tensor, counts: Tensor, ends: Tensor | None = None) -> Tensor:
    """Kernels whose programs determine their expert on the device."""
    ends = running_ends(counts, x.shape[0]) if ends is None else ends
    out: Tensor = _ExpertMatmul.apply(x, weight, ends)  # type: ignore[no-untyped-call]
    return out
