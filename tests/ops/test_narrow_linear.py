"""narrow_linear: the kernels against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sma.ops import using
from sma.ops.narrow_linear import narrow_linear
from tests.devices import DEVICE, needs_triton
from tests.kernels import Compilation, compile_all
from tests.ops.kernel_checks import DTYPES, assert_same, assert_sound, mask_of, numbers, results

pytestmark = needs_triton


@pytest.mark.parametrize("outputs", [1, 2, 5])
@pytest.mark.parametrize("padded", [False, True])
def test_narrow_linear(outputs: int, padded: bool) -> None:
    valid = mask_of(2, 40, 0.8) if padded else None
    # Most tokens give no gradient, as in a router.
    seen = mask_of(2, 40)[..., None]
    square = torch.eye(20, device=DEVICE)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        out, same = narrow_linear(x, weight, bias, valid)
        return torch.where(seen, out, out.detach()), same @ square

    inputs = [numbers(2, 40, 20), numbers(outputs, 20, seed=1), numbers(outputs, seed=2)]
    assert_same(run, inputs)
    assert_same(lambda x, w, b: run(x, w, b)[0], inputs)
    for dtype in DTYPES:
        with using("triton"):
            out, _ = narrow_linear(inputs[0].to(dtype), inputs[1], inputs[2], valid)
        assert out.dtype == torch.float32


def test_narrow_linear_does_not_look_at_padding() -> None:
    x, weight = numbers(2, 9, 4), numbers(2, 4)
    valid = torch.ones(2, 9, dtype=torch.bool, device=DEVICE)
    valid[0, 5:] = False
    x[0, 5:] = torch.nan
    for each in results(lambda x, w: narrow_linear(x, w, w[:, 0], valid)[0], [x, weight], "triton"):
        assert each.isfinite().all()


def test_operators_are_sound() -> None:
    from sma.ops.narrow_linear import launch

    x, weight = numbers(2, 9, 4), numbers(2, 4)
    assert_sound(
        (launch.forward, (x, weight, numbers(2), None)), (launch.backward, (x, weight, numbers(2, 9, 2), None))
    )


def test_kernels_fit_the_hardware() -> None:
    """At real sizes nothing spills from the registers, and shared memory suffices."""
    asked = Compilation(
        "sma.ops.narrow_linear.triton_kernel",
        "backward_kernel",
        {"x": "*bf16", "weight": "*fp32", "grad_out": "*fp32", "grad_x": "*bf16", "grad_weight": "*fp32"}
        | {"grad_bias": "*fp32", "tokens": "i32", "blocks": "i32"},
        {"D": 616, "C": 2, "PADDED_C": 2, "HAS_THROUGH": True, "BLOCK_T": 8, "BLOCK_D": 128},
    )
    (resources,) = compile_all([asked])
    # A few bytes are what the assembler parks in order to run more programs at a time.
    assert resources.spilled <= 64
    assert resources.shared < 100_000
