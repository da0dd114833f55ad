"""combine: the kernels against the reference, in low precision, in bounds, compiled and for the hardware."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from sma.ops import using
from sma.ops.combine import combine
from sma.ops.compress import compress, compress_through
from sma.ops.extract import extract
from sma.ops.narrow_linear import narrow_linear
from sma.ops.row_norm import RowNorm
from sma.routing import Packed
from tests.devices import DEVICE, error_of, needs_triton
from tests.kernels import Compilation, compile_all
from tests.ops.kernel_checks import (
    DTYPES,
    assert_precise,
    assert_same,
    assert_sound,
    differentiable,
    mask_of,
    norms,
    numbers,
    results,
)

pytestmark = needs_triton
REAL_SIZES = {"Text": 128, "ListOps": 80, "Speech": 60, "language model": 616, "widest": 2048}


@pytest.mark.parametrize("capacity", [None, 7, 200])
@pytest.mark.parametrize("silu", [False, True])
def test_combine(capacity: int | None, silu: bool) -> None:
    packed, d = Packed.from_mask(mask_of(3, 12), capacity=capacity), 20
    h, weight, skip, residual = numbers(packed.index.numel(), d), numbers(3, 12), numbers(3, 12, d), numbers(3, 12, d)
    skip_bias = numbers(d, seed=7)
    for weighed, skips, resides, norm in itertools.product((False, True), (False, True), (False, True), norms(d)):
        asked = ((weight, weighed), (skip, skips), (skip_bias, skips), (residual, resides))
        parts = [part for part, there in asked if there]
        parameters = [each for each in ((norm.weight, norm.bias) if norm else ()) if each is not None]
        # Without anything added most tokens are 0, where a norm has a slope of eps^-0.5.
        tolerance = 2e-5 if skips or resides or norm is None else 2e-2

        def run(
            h: Tensor,
            *rest: Tensor,
            there: tuple[bool, ...] = (weighed, skips, skips, resides),
            norm: RowNorm | None = norm,
        ) -> Tensor:
            values = iter(rest)
            weight, skip, skip_bias, residual = (next(values) if each else None for each in there)
            if norm is not None:
                norm = norm._replace(
                    **{key: next(values) for key in ("weight", "bias") if getattr(norm, key) is not None}
                )
            return combine(
                h,
                packed,
                weight=weight,
                skip=skip,
                skip_bias=skip_bias,
                residual=residual,
                activation="silu" if silu else "none",
                norm=norm,
            )

        assert_same(run, [h, *parts, *parameters], tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_combine_is_precise(dtype: torch.dtype) -> None:
    packed = Packed.from_mask(mask_of(3, 40))
    rows = packed.index.numel()

    def draw(seed: int) -> list[Tensor]:
        skip, residual = numbers(3, 40, 64, seed=seed), numbers(3, 40, 64, seed=seed + 10)
        return [numbers(rows, 64, seed=seed), numbers(3, 40, seed=seed).sigmoid(), skip, residual]

    norm = RowNorm(False, 1e-5, numbers(1, seed=5), None)

    def run(h: Tensor, weight: Tensor, skip: Tensor, residual: Tensor) -> Tensor:
        return combine(h, packed, weight=weight, skip=skip, residual=residual, activation="silu", norm=norm)

    assert_precise(run, draw, dtype)


@pytest.mark.parametrize("drop_sum", [False, True])
def test_dropout_of_combine(drop_sum: bool) -> None:
    """About the right share, scaled up; the backward pass drops what the forward pass dropped."""
    packed = Packed.from_mask(mask_of(3, 50))
    h, skip = differentiable(torch.ones(packed.index.numel(), 20), torch.ones(3, 50, 20))
    h, skip = (each.detach().to(DEVICE).requires_grad_() for each in (h, skip))
    with using("triton"):
        y = combine(h, packed, skip=skip, dropout=0.25, drop_sum=drop_sum)
        grad_h, grad_skip = torch.autograd.grad(y.sum(), [h, skip])
        grad_of_h = extract(grad_h, packed)
    dropped = grad_skip if drop_sum else grad_h
    assert abs(float((dropped == 0).float().mean()) - 0.25) < 0.05
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    torch.testing.assert_close(y.detach(), grad_of_h + grad_skip)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("capacity", [None, 7, 200])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_rows_alone(rate: float, capacity: int | None, dropout: float) -> None:
    """Without anything but rows and weights, gradients are what they are next to a residual, and zero without one."""
    packed = Packed.from_mask(mask_of(3, 30, rate), capacity=capacity)
    missing = packed.index >= 90
    h = numbers(packed.index.numel(), 20).masked_fill(missing[:, None], torch.nan)
    weight = numbers(3, 30).masked_fill(packed.row.view(3, 30) < 0, torch.nan)
    grads = []
    for residual in (None, torch.zeros(3, 30, 20, device=DEVICE, requires_grad=True)):
        inputs = differentiable(h, weight)
        torch.manual_seed(0)
        with using("triton"):
            y = combine(inputs[0], packed, weight=inputs[1], residual=residual, dropout=dropout)
        grads.append(torch.autograd.grad(y, inputs, torch.linspace(-1, 1, y.numel(), device=DEVICE).view_as(y)))
    (rows, weights), (expected_rows, expected_weights) = grads
    assert torch.equal(rows, expected_rows)
    assert error_of(weights, expected_weights)[0] <= 2e-5
    assert not rows[missing].any()
    assert not weights.flatten()[packed.row < 0].any()


def test_nothing_that_is_not_active_leaks() -> None:
    mask = mask_of(3, 20)
    packed = Packed.from_mask(mask)
    x = numbers(3, 20, 8).masked_fill(~mask[..., None], torch.nan)
    weight = numbers(3, 20).masked_fill(~mask, torch.nan)
    skip = numbers(3, 20, 8)
    run = lambda x, weight, skip: combine(compress(x, packed), packed, weight=weight, skip=skip, activation="silu")  # noqa: E731
    for each in results(run, [x, weight, skip], "triton"):
        assert each.isfinite().all()


def test_the_same_bits_twice() -> None:
    packed = Packed.from_mask(mask_of(3, 50))
    norm = RowNorm(True, 1e-5, numbers(20), numbers(20))
    run = lambda h, skip: combine(h, packed, skip=skip, activation="silu", norm=norm)  # noqa: E731
    inputs = [numbers(packed.index.numel(), 20), numbers(3, 50, 20)]
    assert all(map(torch.equal, results(run, inputs, "triton"), results(run, inputs, "triton")))


def test_operators_are_sound() -> None:
    from sma.ops.combine import launch

    packed = Packed.from_mask(mask_of(2, 9))
    x, h, none = numbers(18, 4), numbers(packed.index.numel(), 4), (None,) * 7
    options, plain = (True, False, False, 1.0, 0.0, False), (False, False, False, 1.0, 0.0, False)
    assert_sound(
        (launch.forward, (h, packed.row, *none, *options)),
        (launch.backward, (x, x, h, packed.index, packed.row, *none[:5], *options, False, True, True)),
        (launch.backward, (x, x, h, packed.index, packed.row, *none[:5], *plain, True, False, False)),
    )


def test_compiles_in_one_graph() -> None:
    packed, norm = Packed.from_mask(mask_of(2, 9)), RowNorm(True, 1e-5, numbers(4), numbers(4))

    def run(x: Tensor, weight: Tensor) -> Tensor:
        logits, x = narrow_linear(x, weight, weight[:, 0])
        tokens, x = compress_through(x, packed)
        return combine(
            tokens * 2, packed, weight=logits[..., 0], skip=x @ weight.T @ weight, activation="silu", norm=norm
        )

    inputs = [numbers(2, 9, 4), numbers(2, 4)]
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(results(compiled, inputs, "triton"), results(run, inputs, "triton"), strict=True):
        torch.testing.assert_close(actual, expected)


def test_kernels_fit_the_hardware() -> None:
    """At real sizes nothing spills from the registers, and shared memory suffices."""
    from sma.ops.row_norm import launch as norm_launch

    asked: list[Compilation] = []
    pointers = {
        "h": "*bf16",
        "row": "*i32",
        "weight": "*fp32",
        "skip": "*bf16",
        "skip_bias": "*fp32",
        "residual": "*bf16",
        "seed": "*i64",
    }
    norm = {
        "norm_weight": "*fp32",
        "norm_bias": "*fp32",
        "norm_eps": "fp32",
        "dropped": "i32",
        "scaled_up": "fp32",
        "tokens": "i32",
        "blocks": "i32",
    }
    for d in REAL_SIZES.values():
        block_t, block_d, warps = norm_launch.sizes(d)
        sizes = {"D": d, "BLOCK_T": block_t, "BLOCK_D": block_d}
        flags = {
            "HAS_WEIGHT": True,
            "HAS_SKIP_BIAS": True,
            "SILU": True,
            "NORM": True,
            "CENTRED": True,
            "WEIGHT_STRIDE": 1,
            "HAS_BIAS": True,
        }
        flags |= {"DROP": True, "DROP_SUM": True, "KEEP": True, **sizes}
        module, options = "sma.ops.combine.triton_kernel", {"num_warps": warps}
        forward = {**pointers, **norm, "total": "*bf16", "out": "*bf16"}
        asked.append(
            Compilation(module, "forward_kernel", forward, {**flags, "HAS_SKIP": True, "HAS_RESIDUAL": True}, options)
        )
        grads = dict.fromkeys(("grad", "total", "grad_residual", "grad_skip", "grad_h"), "*bf16")
        grads |= dict.fromkeys(("grad_weight", "shares"), "*fp32")
        backward = {**flags, "STORE_SUM": True, "STORE_SKIP": True}
        asked.append(Compilation(module, "backward_kernel", {**pointers, **norm, **grads}, backward, options))
        alone = {
            "D": d,
            "HAS_WEIGHT": True,
            "DROP": True,
            "BLOCK_R": max(1, block_t // 2),
            "BLOCK_D": block_d,
            "BLOCK_T": 256,
        }
        types = {**pointers, **norm, **grads, "index": "*i64", "rows": "i32"}
        asked.append(Compilation(module, "rows_backward_kernel", types, alone, options))
    for compilation, resources in zip(asked, compile_all(asked), strict=True):
        # A few bytes are what the assembler parks in order to run more programs at a time.
        assert resources.spilled <= 64, compilation
        assert resources.shared < 100_000, compilation
