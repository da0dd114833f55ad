"""The kernels of sma.ops against their references: values, gradients, low precision, bounds, compilation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sma.ops import using
from sma.ops.combine import combine
from sma.ops.compress import compress, compress_through
from sma.ops.extract import extract
from sma.ops.narrow_linear import narrow_linear
from sma.ops.pack import pack
from sma.ops.row_norm import RowNorm, row_norm
from sma.routing import Packed
from sma.testing.precision import imprecision, known_to
from tests.devices import DEVICE, error_of, needs_triton
from tests.kernels import Compilation, compile_all

pytestmark = needs_triton
# Triton's interpreter cuts numbers off where it makes them bfloat16, instead of rounding.
LOW = (torch.bfloat16, torch.float16) if DEVICE.type == "cuda" else (torch.float16,)
DTYPES = (torch.float32, *LOW)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE)


def mask_of(batch: int, length: int, rate: float = 0.3) -> Tensor:
    mask = torch.rand(batch, length, generator=torch.Generator().manual_seed(1)) < rate
    if batch > 1:
        mask[1] = False
    return mask.to(DEVICE)


def differentiable(*values: Tensor | None) -> list[Tensor]:
    return [value.detach().clone().requires_grad_() for value in values if value is not None]


def results(run: Callable[..., Any], inputs: list[Tensor], backend: str, factors: Tensor | None = None) -> list[Tensor]:
    """Output and gradients by one backend; ``factors`` of the gradient that comes in, one for each number."""
    inputs = differentiable(*inputs)
    with using(backend):
        out = run(*inputs)
        outs = out if isinstance(out, tuple) else (out,)
        weights = [torch.linspace(-1, 1, each.numel(), device=DEVICE) for each in outs]
        if factors is not None:
            weights = [each * factors[: each.numel()] for each in weights]
        loss = sum((each.float() * w.view_as(each)).sum() for each, w in zip(outs, weights, strict=True))
        assert isinstance(loss, Tensor)
        grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [each.detach() for each in (*outs, *grads) if each is not None]


def assert_same(run: Callable[..., Any], inputs: list[Tensor], tolerance: float = 2e-5) -> None:
    for actual, expected in zip(results(run, inputs, "triton"), results(run, inputs, "reference"), strict=True):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        bound = tolerance * max(1.0, float(expected.abs().max())) if expected.numel() else 0.0
        assert error_of(actual, expected)[0] <= bound


def assert_precise(run: Callable[..., Any], draw: Callable[[int], list[Tensor]], dtype: torch.dtype) -> None:
    """As precise as the eager backend in the same precision (:mod:`sma.testing.precision`).

    Over several draws: a sum alone, such as the gradient of a single weight, may be right by chance.
    """
    draws = []
    for seed in range(8):
        low = [each.to(dtype) for each in draw(seed)]
        wide = [each.double() for each in low]
        exact = results(run, wide, "eager")
        # The gradient that comes in is known no better than the rest.
        factors = torch.ones(max(each.numel() for each in exact), dtype=torch.float64, device=DEVICE)
        known = known_to(lambda moved: results(run, moved[:-1], "eager", moved[-1]), exact, [*wide, factors])
        draws.append((results(run, low, "triton"), results(run, low, "eager"), exact, known))
    mine, plain, truth = ([_joined(each) for each in zip(*(draw[k] for draw in draws), strict=True)] for k in range(3))
    for i, (ours, eager, exact_one) in enumerate(zip(mine, plain, truth, strict=True)):
        units = [each[3][i] for each in draws]
        known_one = max(largest for largest, _ in units), sum(mean for _, mean in units) / len(units)
        why = imprecision(ours, eager, exact_one, known_one, in_16_bits=dtype != torch.float32)
        assert why is None, f"result {i}: {why}"


def _joined(values: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([each.flatten() for each in values])


SHAPES = ((3, 50), (1, 1), (2, 129))


@pytest.mark.parametrize("shape", [*SHAPES, (4, 1030)])
@pytest.mark.parametrize("capacity", [None, 1, 7, 5000])
@pytest.mark.parametrize("positions", [None, "own", "shared"])
def test_pack(shape: tuple[int, int], capacity: int | None, positions: str | None) -> None:
    mask = mask_of(*shape)
    own = torch.arange(mask.numel(), device=DEVICE).view(shape) * 3
    position = {None: None, "own": own, "shared": own[:1].expand(shape)}[positions]
    with using("reference"):
        expected = pack(mask, position, capacity=capacity)
    for backend in ("eager", "triton"):
        with using(backend):
            actual = pack(mask, position, capacity=capacity)
        for name in expected._fields:
            have, want = getattr(actual, name), getattr(expected, name)
            assert (have is None) == (want is None), name
            assert have is None or (torch.equal(have, want) and have.dtype == want.dtype), name


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("capacity", [None, 7, 200])
def test_data_movement_is_exact(rate: float, capacity: int | None) -> None:
    packed = Packed.from_mask(mask_of(3, 50, rate), capacity=capacity)
    rows, x, square = packed.index.numel(), numbers(3, 50, 20), torch.eye(20, device=DEVICE)
    h = numbers(rows, 20, seed=2)

    def through(x: Tensor) -> tuple[Tensor, Tensor]:
        tokens, same = compress_through(x, packed)
        return tokens, same @ square

    moves: tuple[tuple[Callable[..., Any], Tensor], ...] = (
        (lambda x: compress(x, packed), x),
        (lambda h: extract(h, packed), h),
    )
    for run, value in moves:
        for actual, expected in zip(results(run, [value], "triton"), results(run, [value], "reference"), strict=True):
            assert torch.equal(actual, expected)
    assert_same(through, [x], 1e-6)


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


def norms(d: int) -> Iterator[RowNorm | None]:
    yield None
    yield RowNorm(False, 1e-5, None, None)
    yield RowNorm(False, 1e-5, numbers(1, seed=5), None)
    yield RowNorm(True, 1e-5, numbers(d, seed=5), numbers(d, seed=6))


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


def test_nothing_around_the_output_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and indices that are out of range write nowhere."""
    from sma.ops.compress.triton_kernel import ELEMENTS, add_, take

    whole = torch.full((3, 4 * ELEMENTS), 7.0, device=DEVICE)
    index = torch.tensor([-5, 2**40, 3, 11, -(2**40)], device=DEVICE)
    into = whole[1, : 8 * 12].view(8, 12)
    add_(into, index, torch.ones(5, 12, device=DEVICE))
    assert (whole[0] == 7).all()
    assert (whole[1, 8 * 12 :] == 7).all()
    assert (whole[2] == 7).all()
    assert into.sum(1).tolist() == [84.0] * 3 + [96.0] + [84.0] * 4
    assert take(into, index).sum(1).tolist() == [0.0, 0.0, 96.0, 0.0, 0.0]


def test_operators_are_sound() -> None:
    from sma.ops.combine import launch as merge
    from sma.ops.compress import triton_kernel as rows
    from sma.ops.narrow_linear import triton_kernel as linear
    from sma.ops.pack import triton_kernel as packing
    from sma.ops.row_norm import triton_kernel as norm_kernel

    packed = Packed.from_mask(mask_of(2, 9))
    x, h, mask = numbers(18, 4), numbers(packed.index.numel(), 4), mask_of(2, 9)
    none = (None,) * 7
    options, plain = (True, False, False, 1.0, 0.0, False), (False, False, False, 1.0, 0.0, False)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (rows.take, (x, packed.index)),
        (rows.add_, (x.clone(), packed.index, h)),
        (linear.forward, (x.view(2, 9, 4), numbers(2, 4), numbers(2), None)),
        (linear.backward, (x.view(2, 9, 4), numbers(2, 4), numbers(2, 9, 2), None)),
        (packing.count, (mask,)),
        (packing.place, (mask, packing.count(mask), None, 18, True)),
        (packing.place, (mask, packing.count(mask), None, 18, False)),
        (merge.forward, (h, packed.row, *none, *options)),
        (merge.backward, (x, x, h, packed.index, packed.row, *none[:5], *options, False, True, True)),
        (merge.backward, (x, x, h, packed.index, packed.row, *none[:5], *plain, True, False, False)),
        (norm_kernel.forward, (x, None, None, True, 1e-5)),
        (norm_kernel.backward, (x, x, None, None, True, 1e-5)),
    ]
    for call, arguments in calls:
        torch.library.opcheck(call.operator, arguments, test_utils=("test_schema", "test_faketensor"))


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


REAL_SIZES = {"Text": 128, "ListOps": 80, "Speech": 60, "language model": 616, "widest": 2048}


def test_kernels_fit_the_hardware() -> None:
    """At real sizes nothing spills from the registers, and shared memory suffices."""
    from sma.ops.row_norm import triton_kernel as norm_kernel

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
        block_t, block_d, warps = norm_kernel.sizes(d)
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
    asked.append(
        Compilation(
            "sma.ops.narrow_linear.triton_kernel",
            "backward_kernel",
            {"x": "*bf16", "weight": "*fp32", "grad_out": "*fp32", "grad_x": "*bf16", "grad_weight": "*fp32"}
            | {"grad_bias": "*fp32", "tokens": "i32", "blocks": "i32"},
            {"D": 616, "C": 2, "PADDED_C": 2, "HAS_THROUGH": True, "BLOCK_T": 8, "BLOCK_D": 128},
        )
    )
    for compilation, resources in zip(asked, compile_all(asked), strict=True):
        # A few bytes are what the assembler parks in order to run more programs at a time.
        assert resources.spilled <= 64, compilation
        assert resources.shared < 100_000, compilation
