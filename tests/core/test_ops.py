"""compress, extract and segment_sum: every backend is the reference; and the custom operation of decisions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from sma.configurators import FixedRate
from sma.errors import BackendError, ShapeError
from sma.layer import SparselyActivated
from sma.ops import operations, using
from sma.ops.backend import Op, forget
from sma.ops.compress import OP as COMPRESS
from sma.ops.compress import compress, compress_through
from sma.ops.extract import OP as EXTRACT
from sma.ops.extract import extract
from sma.ops.narrow_linear import narrow_linear
from sma.ops.segment_sum import OP as SEGMENT_SUM
from sma.ops.segment_sum import segment_sum
from sma.routing import Packed
from sma.runtime.checkpointing import mark_decision
from sma.testing import OpCase, OpSuite

LENGTHS = (0, 1, 2, 63, 100, 129)
NAMES = ("compress", "extract", "segment_sum")


def masks() -> Iterator[tuple[str, Tensor]]:
    """Nothing active, everything active, and halves with an empty row, at each length."""
    generator = torch.Generator().manual_seed(0)
    for length in LENGTHS:
        some = torch.rand(3, length, generator=generator) < 0.5
        some[1] = False
        yield f"some of {length}", some
        yield f"none of {length}", torch.zeros(2, length, dtype=torch.bool)
        yield f"all of {length}", torch.ones(2, length, dtype=torch.bool)
    yield "no row", torch.ones(0, 5, dtype=torch.bool)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class TestCompress(OpSuite):
    op = COMPRESS
    moves_data = True

    def cases(self) -> Iterator[OpCase]:
        for name, mask in masks():
            yield OpCase(name, (numbers(*mask.shape, 3), Packed.from_mask(mask)))
        yield OpCase("no features", (numbers(2, 4), Packed.from_mask(torch.tensor([[True, False, True, True]] * 2))))


class TestExtract(OpSuite):
    op = EXTRACT
    moves_data = True

    def cases(self) -> Iterator[OpCase]:
        for name, mask in masks():
            yield OpCase(name, (numbers(int(mask.sum()), 3), Packed.from_mask(mask)))
        yield OpCase("two features", (numbers(3, 2, 2), Packed.from_mask(torch.tensor([[True, False, True, True]]))))


class TestSegmentSum(OpSuite):
    op = SEGMENT_SUM

    def cases(self) -> Iterator[OpCase]:
        for name, mask in masks():
            yield OpCase(name, (numbers(int(mask.sum()), 3), Packed.from_mask(mask).cu_seqlens))


@pytest.mark.parametrize("name", ["reference", "eager", pytest.param("torch_scatter", marks=pytest.mark.scatter)])
def test_what_is_inactive_never_leaks(name: str) -> None:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    packed = Packed.from_mask(mask)
    x = numbers(2, 3, 4).masked_fill(~mask[..., None], float("nan")).requires_grad_()
    with using(name):
        y = extract(compress(x, packed), packed)
    assert torch.equal(y, x.detach().nan_to_num(0.0))
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, mask[..., None].expand_as(x).double())


@pytest.mark.parametrize("name", ["reference", "eager", pytest.param("torch_scatter", marks=pytest.mark.scatter)])
def test_a_poisoned_sequence_stays_by_itself(name: str) -> None:
    x = numbers(5, 2)
    x[2] = float("nan")
    with using(name):
        sums = segment_sum(x, torch.tensor([0, 2, 2, 3, 5]))
    assert sums.isnan().tolist() == [[False] * 2, [False] * 2, [True] * 2, [False] * 2]
    assert torch.equal(sums[1], torch.zeros(2, dtype=torch.float64))


@pytest.mark.scatter
@pytest.mark.parametrize("name", NAMES)
def test_torch_scatter_is_a_backend(name: str) -> None:
    mask = torch.tensor([[True, False, True]])
    packed = Packed.from_mask(mask)
    arguments = {
        "compress": (numbers(1, 3, 2), packed),
        "extract": (numbers(2, 2), packed),
        "segment_sum": (numbers(2, 2), packed.cu_seqlens),
    }[name]
    assert operations()[name].explain(*arguments)["torch_scatter"] is None
    half = (arguments[0].to(torch.bfloat16), arguments[1])
    assert "bfloat16" in str(operations()[name].explain(*half)["torch_scatter"])
    assert operations()[name].choose(*half).name == "eager"


def test_extract_undoes_compress() -> None:
    for name, mask in masks():
        packed = Packed.from_mask(mask)
        h = numbers(int(mask.sum()), 2)
        assert torch.equal(compress(extract(h, packed), packed), h), name


def test_each_is_the_gradient_of_the_other() -> None:
    packed = Packed.from_mask(torch.tensor([[True, False, True, False], [False, True, True, True]]))
    x, h = numbers(2, 4, 3).requires_grad_(), numbers(5, 3)
    (grad,) = torch.autograd.grad(compress(x, packed), x, h)
    assert torch.equal(grad, extract(h, packed))


@pytest.mark.parametrize("used", [("tokens",), ("x",), ("logits",), ("tokens", "x", "logits")], ids=",".join)
def test_gradients_that_pass_through_are_the_sum(used: tuple[str, ...]) -> None:
    """On a CPU they are added in place; gradients of gradients see the same sums."""
    mask = torch.tensor([[True, False, True, False], [False, True, True, True]])
    packed = Packed.from_mask(mask)
    x, weight, bias, after = numbers(2, 4, 6), numbers(2, 6), numbers(2), numbers(3, 6)
    inputs = [each.requires_grad_() for each in (x, weight, bias, after)]

    def loss() -> Tensor:
        logits, through = narrow_linear(x, weight, bias)
        tokens, through = compress_through(through, packed)
        parts = {"tokens": tokens, "x": through @ after.t(), "logits": logits}
        return torch.stack([parts[name].pow(3).sum() for name in used]).sum()

    def gradients() -> list[Tensor]:
        first = torch.autograd.grad(loss(), inputs, allow_unused=True, materialize_grads=True)
        graph = torch.autograd.grad(loss(), inputs, create_graph=True, allow_unused=True, materialize_grads=True)
        total = torch.stack([each.square().sum() for each in graph]).sum()
        second = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
        for with_graph, without in zip(graph, first, strict=True):
            torch.testing.assert_close(with_graph, without)
        return [*first, *second]

    ours = gradients()
    with using("reference"):
        theirs = gradients()
    for have, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(have, want)


def test_compile_keeps_one_graph_through_the_gradient() -> None:
    packed = Packed.from_mask(torch.tensor([[True, False, True], [True, True, False]]))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def doubled(x: Tensor) -> Tensor:
        return extract(compress(x, packed) * 2, packed)

    x = numbers(2, 3, 2).requires_grad_()
    y = doubled(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, extract(compress(x, packed) * 2, packed))
    assert torch.equal(grad, 2 * extract(torch.ones(4, 2, dtype=torch.float64), packed))


def test_wrong_shapes_are_refused() -> None:
    packed = Packed.from_mask(torch.tensor([[True, False, True]]))
    with pytest.raises(ShapeError, match=r"compress: x must begin with \(B, L\) = \(1, 3\)"):
        compress(torch.randn(1, 4, 2), packed)
    with pytest.raises(ShapeError, match="extract: h must have one row for each of 2 active tokens, got 3"):
        extract(torch.randn(3, 2), packed)
    with pytest.raises(ShapeError, match="cu_seqlens"):
        segment_sum(torch.randn(3, 2), torch.zeros(0, dtype=torch.int64))


def test_backends_that_cannot_run_say_why() -> None:
    op = Op("only_even")
    try:
        op.backend("even", applies=lambda n: None if n % 2 == 0 else f"{n} is odd")(lambda n: n // 2)
        assert op(4) == 2
        with pytest.raises(BackendError, match=r"only_even: no backend applies: .*3 is odd"):
            op(3)
        with using("even"), pytest.raises(BackendError, match="'even' was forced and cannot run: 3 is odd"):
            op(3)
        op.backend("any", priority=90)(lambda n: -n)
        assert (op(3), op(4)) == (-3, 2)
        with using("any"):
            assert op(4) == -4
    finally:
        forget(op)
    with (
        pytest.raises(BackendError, match=r"using\('fast'\): no operation has such a backend; there are .*eager"),
        using("fast"),
    ):
        pass


def test_forced_backends_nest_and_end() -> None:
    x, packed = torch.randn(1, 2, 1), Packed.from_mask(torch.ones(1, 2, dtype=torch.bool))
    assert COMPRESS.choose(x, packed).name == "eager"
    with using("reference"):
        assert COMPRESS.choose(x, packed).name == "reference"
        with using("eager"):
            assert COMPRESS.choose(x, packed).name == "eager"
        assert COMPRESS.choose(x, packed).name == "reference"
    assert COMPRESS.choose(x, packed).name == "eager"


@pytest.mark.parametrize("shape", [(2, 3, 1), (0, 3, 2), (2, 0, 2)])
def test_the_operation_of_decisions(shape: tuple[int, ...]) -> None:
    active = torch.rand(shape) < 0.5
    torch.library.opcheck(torch.ops.sma.decision.default, (active,))
    torch.library.opcheck(torch.ops.sma.decision.default, (active.transpose(0, 1),))
    torch.library.opcheck(torch.ops.sma.decision.default, (torch.ones(2, 3, 1, dtype=torch.bool).expand(2, 3, 4),))
    marked = mark_decision(active)
    assert torch.equal(marked, active)
    assert marked.untyped_storage().data_ptr() != active.untyped_storage().data_ptr() or not active.numel()


def test_packed_views_agree() -> None:
    mask = torch.tensor([[False, True, True, False], [False] * 4, [True, False, True, True]])
    packed = Packed.from_mask(mask, torch.arange(12).view(3, 4) + 100)
    assert packed.index.tolist() == [1, 2, 8, 10, 11]
    assert packed.cu_seqlens.tolist() == [0, 2, 2, 5]
    assert packed.lengths.tolist() == [2, 0, 3]
    assert packed.sequence.tolist() == [0, 0, 2, 2, 2]
    assert packed.rank.tolist() == [0, 1, 0, 1, 2]
    assert packed.position.tolist() == [101, 102, 108, 110, 111]
    assert (packed.max_length, packed.batch, packed.shape) == (3, 3, (3, 4))
    assert Packed.from_mask(mask).position.tolist() == [1, 2, 0, 2, 3]


@pytest.mark.scatter
def test_torch_scatter_takes_layers_in_which_nothing_is_active() -> None:
    layer = SparselyActivated(nn.Linear(3, 3), FixedRate(FixedRate.Config(rate=0.0)))
    x = torch.randn(2, 4, 3, requires_grad=True)
    with using("torch_scatter"):
        output = layer(x).output
        sums = segment_sum(torch.zeros(0, 3), torch.zeros(3, dtype=torch.int64))
    output.sum().backward()
    assert torch.equal(output, torch.zeros(2, 4, 3))
    assert torch.equal(x.grad, torch.zeros(2, 4, 3))
    assert torch.equal(sums, torch.zeros(2, 3))
