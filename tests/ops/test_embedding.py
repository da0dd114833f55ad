"""embedding: a gather, and a gradient that is summed in order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sma
from sma.errors import ShapeError
from sma.ops import using
from sma.ops.embedding import embedding
from tests.devices import DEVICE, needs_triton
from tests.kernels import Compilation, compile_all
from tests.ops.kernel_checks import LOW, assert_same, numbers, results


def tokens_of(*shape: int, rows: int) -> Tensor:
    return torch.randint(rows, shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def looked_up(tokens: Tensor, scale: float = 1.0, dtype: torch.dtype | None = None) -> Callable[[Tensor], Tensor]:
    return lambda weight: embedding(tokens, weight, scale=scale, dtype=dtype)


@needs_triton
@pytest.mark.parametrize(("shape", "rows", "d"), [((2, 3), 2, 4), ((3, 50), 257, 20), ((1, 129), 130, 70)])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_equal_to_the_reference(shape: tuple[int, int], rows: int, d: int, scale: float) -> None:
    tokens, weight = tokens_of(*shape, rows=rows), numbers(rows, d)
    assert_same(looked_up(tokens, scale), [weight], 1e-6)
    with using("triton"):
        out = embedding(tokens.to(torch.uint8) if rows <= 256 else tokens.int(), weight, scale=scale)
    assert torch.equal(out, embedding(tokens, weight, scale=scale))


@needs_triton
@pytest.mark.parametrize("dtype", LOW)
def test_the_gradient_is_summed_wide(dtype: torch.dtype) -> None:
    """Of an output in low precision: exact up to the rounding of what comes in."""
    tokens, weight = tokens_of(4, 200, rows=9), numbers(9, 20)
    cotangent = numbers(4, 200, 20, seed=3).to(dtype)
    grads = []
    for backend in ("triton", "eager"):
        table = weight.clone().requires_grad_()
        with using(backend):
            out = embedding(tokens, table, scale=2.0, dtype=dtype)
        assert out.dtype == dtype
        grads.append(torch.autograd.grad(out, table, cotangent)[0])
    exact = torch.zeros(9, 20, dtype=torch.float64, device=DEVICE)
    exact.index_add_(0, tokens.flatten(), 2 * cotangent.double().view(-1, 20))
    mine, theirs = ((grad.double() - exact).abs().max() for grad in grads)
    assert grads[0].dtype == torch.float32
    assert float(mine) <= 2 * float(theirs) + 1e-6


@needs_triton
def test_the_same_bits_twice() -> None:
    run, weight = looked_up(tokens_of(3, 100, rows=5)), numbers(5, 20)
    assert all(map(torch.equal, results(run, [weight], "triton"), results(run, [weight], "triton")))


@needs_triton
def test_what_is_out_of_range_touches_nothing() -> None:
    tokens = torch.tensor([[0, -1, 3], [2**40, 2, -(2**40)]], device=DEVICE)
    weight = numbers(3, 20).requires_grad_()
    with using("triton"):
        out = embedding(tokens, weight)
    assert torch.equal(out[0, 0], weight[0])
    assert torch.equal(out[1, 1], weight[2])
    assert not out[[0, 0, 1, 1], [1, 2, 0, 2]].any()
    out.sum().backward()
    assert weight.grad is not None
    assert weight.grad[:, 0].tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_batches_without_tokens(backend: str) -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    with using(backend):
        out = embedding(torch.zeros(2, 0, dtype=torch.int64), weight)
    assert out.shape == (2, 0, 4)
    (grad,) = torch.autograd.grad(out.sum(), weight)
    assert not grad.any()


def test_bad_input() -> None:
    with pytest.raises(ShapeError, match=r"must be matrices, got \(3,\), \(4, 2\)"):
        embedding(torch.zeros(3, dtype=torch.int64), torch.zeros(4, 2))


@needs_triton
def test_large_tables_go_the_other_way() -> None:
    from sma.ops.embedding import OP

    reason = OP.explain(tokens_of(1, 2, rows=5), numbers(1025, 4), 1.0, torch.float32)["triton"]
    assert reason == "the kernel takes at most 1024 rows, got 1025"


@needs_triton
def test_operators_are_sound_and_compile() -> None:
    from sma.ops.embedding import launch as kernels

    tokens, weight = tokens_of(2, 70, rows=9), numbers(9, 20)
    out = kernels.forward(tokens, weight, 2.0, torch.float32)
    for call, arguments in (
        (kernels.forward, (tokens, weight, 2.0, torch.bfloat16)),
        (kernels.backward, (tokens, out, 9, 2.0)),
    ):
        torch.library.opcheck(call.operator, arguments, test_utils=("test_schema", "test_faketensor"))
    torch._dynamo.reset()
    compiled = torch.compile(looked_up(tokens), fullgraph=True, backend="aot_eager")
    for actual, expected in zip(
        results(compiled, [weight], "triton"), results(looked_up(tokens), [weight], "triton"), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@needs_triton
def test_kernels_fit_the_hardware() -> None:
    from sma.ops.embedding import launch as kernels

    signature = {"tokens": "*i64", "shares": "*fp32", "count": "i32", "rows": "i32", "each": "i32", "scale": "fp32"}
    sizes = {"BLOCK_V": kernels.BLOCK_V, "BLOCK_T": kernels.BLOCK_T, "BLOCK_D": kernels.BLOCK_D}
    asked = [
        Compilation(
            "sma.ops.embedding.triton_kernel",
            "backward_kernel",
            {**signature, "grad": f"*{kind}"},
            {"D": d, "PRECISION": precision, **sizes},
            {"num_warps": kernels.BACKWARD_WARPS},
        )
        for d in (128, 616)
        for kind, precision in (("bf16", "ieee"), ("fp32", "tf32x3"))
    ]
    for compilation, resources in zip(asked, compile_all(asked), strict=True):
        assert resources.spilled == 0, compilation
        assert resources.shared < 100_000, compilation


def test_a_model_takes_another_table() -> None:
    """As tools that resize or wrap embeddings put in."""
    model = sma.build("seqboat_small_lm", "d_model=16", "n_layers=2").eval()
    tokens = torch.randint(256, (1, 9))
    expected = model(tokens).logits
    plain = nn.Embedding(model.vocab_size, 16)
    plain.weight = model.embedding.weight
    model.embedding = plain
    torch.testing.assert_close(model(tokens).logits, expected)
