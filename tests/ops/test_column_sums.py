"""column_sums: every row once, in float32, for any number of rows."""

from __future__ import annotations

import pytest
import torch

from tests.devices import DEVICE, needs_triton
from tests.kernels import Compilation, compile_all
from tests.ops.kernel_checks import numbers

pytestmark = needs_triton


@pytest.mark.parametrize("rows", [0, 1, 127, 129, 256, 257, 1000, 2600])
@pytest.mark.parametrize("d", [0, 1, 33, 64])
def test_every_row_counts_once(rows: int, d: int) -> None:
    from sma.ops.column_sums.launch import column_sums

    walls = torch.full((rows + 2, max(d, 1)), torch.nan, device=DEVICE)
    x = walls[1:-1, :d] if d else walls.new_empty(rows, 0)
    x.copy_(torch.arange(rows * d, device=DEVICE).view(rows, d) % 7)  # sums without a rounding error
    assert torch.equal(column_sums(x, torch.float32), x.sum(0))
    assert torch.equal(column_sums(x.half(), torch.float32), x.sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rounded_once(dtype: torch.dtype) -> None:
    from sma.ops.column_sums.launch import column_sums

    x = numbers(700, 40).to(dtype)
    exact = x.double().sum(0)
    for _ in range(2):
        actual = column_sums(x, dtype)
        assert actual.dtype == dtype
        error = (actual.double() - exact).abs().max()
        assert error <= torch.finfo(dtype).eps * exact.abs().max() / 2 + 700**0.5 * torch.finfo(torch.float32).eps * 4
    assert torch.equal(actual, column_sums(x, dtype))


def test_operator_is_sound() -> None:
    from sma.ops.column_sums.launch import column_sums

    for rows in (5, 300):
        arguments = (numbers(rows, 9), torch.float16)
        torch.library.opcheck(column_sums.operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_kernel_fits_the_hardware() -> None:
    from sma.ops.column_sums.launch import BLOCK_D, BLOCK_R, WARPS

    module, sizes = "sma.ops.column_sums.triton_kernel", {"BLOCK_R": BLOCK_R, "BLOCK_D": BLOCK_D}
    asked = [
        Compilation(
            module,
            "sum_kernel",
            {"x": x, "out": "*fp32", "rows": "i32", "each": "i32"},
            {"D": d, **sizes},
            {"num_warps": WARPS},
        )
        for x in ("*bf16", "*fp32")
        for d in (1024, 2051)
    ]
    for request, resources in zip(asked, compile_all(asked), strict=True):
        assert resources.spilled == 0, request
