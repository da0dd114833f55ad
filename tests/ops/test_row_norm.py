"""row_norm: the kernels against the reference, and in low precision."""

from __future__ import annotations

import pytest
from torch import Tensor

from sma.ops.row_norm import RowNorm, row_norm
from tests.devices import needs_triton
from tests.ops.kernel_checks import DTYPES, assert_precise, assert_same, assert_sound, norms, numbers

pytestmark = needs_triton


@pytest.mark.parametrize("d", [1, 20, 129])
def test_row_norm(d: int) -> None:
    for norm in norms(d):
        if norm is None:
            continue
        parameters = [each for each in (norm.weight, norm.bias) if each is not None]

        def run(x: Tensor, *parameters: Tensor, norm: RowNorm = norm) -> Tensor:
            weight, bias = (*parameters, None, None)[:2]
            return row_norm(x, norm._replace(weight=weight, bias=bias))

        assert_same(run, [numbers(3, 7, d) * 3 + 1, *parameters], 1e-4)
        for dtype in DTYPES if d > 1 else ():  # a single number has no slope but rounding errors
            assert_precise(run, lambda seed, more=parameters: [numbers(40, 7, d, seed=seed), *more], dtype)


def test_operators_are_sound() -> None:
    from sma.ops.row_norm import launch

    x = numbers(18, 4)
    assert_sound((launch.forward, (x, None, None, True, 1e-5)), (launch.backward, (x, x, None, None, True, 1e-5)))
