"""router: the decision of a layer in one kernel each way, and when a layer may take it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sma.configurators import Sigmoid, TemperedSoftmax
from sma.decision import gate_of
from sma.errors import ShapeError
from sma.interfaces import Configurator
from sma.layer import SparseMixture
from sma.ops import using
from sma.ops.compress import compress as compress_plain
from sma.ops.pack import pack
from sma.ops.router import Gate, Routed, routed_compress, router
from sma.routing import Packed
from sma.runtime.checkpointing import checkpoint
from tests.devices import DEVICE, error_of, needs_triton
from tests.kernels import Compilation, compile_all
from tests.ops.test_kernels_of_the_core import DTYPES, assert_precise, assert_same, mask_of, numbers, results

SQUARE = torch.eye(20, device=DEVICE)
LENGTHS = torch.tensor([40, 13], device=DEVICE)


def padding(kind: str) -> dict[str, Tensor]:
    return {"none": {}, "mask": {"valid": mask_of(2, 40, 0.8)}, "lengths": {"lengths": LENGTHS}}[kind]


def inputs_of(modules: int, logits: int, seed: int = 0) -> list[Tensor]:
    outputs = modules * logits
    shapes = ((2, 40, 20), (outputs, 20), (outputs,), (modules,), (1,))
    x, weight, bias, balance, log_temperature = (numbers(*s, seed=10 * seed + i) for i, s in enumerate(shapes))
    return [x, weight, bias, balance, 0.3 * log_temperature]


def through(padded: dict[str, Tensor], learned: bool = True) -> Callable[..., tuple[Tensor, Tensor]]:
    """Scores of few tokens, as in a layer, and the tokens after a matrix product."""
    seen = mask_of(2, 40)[..., None]

    def run(x: Tensor, weight: Tensor, bias: Tensor, balance: Tensor, log_temperature: Tensor) -> tuple[Tensor, Tensor]:
        gate = Gate(balance.detach(), log_temperature if learned else None, 1.3, 0.45)
        out = router(x, weight, bias, gate, **padded)
        unused = 0 * (balance.sum() + log_temperature.sum())
        return out.score * seen + unused, out.x @ SQUARE.to(x.dtype)

    return run


@needs_triton
@pytest.mark.parametrize("kind", ["none", "mask", "lengths"])
@pytest.mark.parametrize(("modules", "logits", "learned"), [(1, 2, True), (1, 1, False), (3, 2, True), (5, 1, True)])
def test_equal_to_the_reference(kind: str, modules: int, logits: int, learned: bool) -> None:
    run, inputs = through(padding(kind), learned), inputs_of(modules, logits)
    assert_same(run, inputs, 1e-5)
    decided: dict[str, Routed] = {}
    columns = torch.arange(40, device=DEVICE).expand(2, 40)
    for backend in ("triton", "eager", "reference"):
        with using(backend):
            gate = Gate(inputs[3], inputs[4] if learned else None, 1.3, 0.45)
            decided[backend] = router(*inputs[:3], gate, **padding(kind))
    for backend in ("triton", "eager"):
        assert torch.equal(decided[backend].active, decided["reference"].active)
        assert torch.equal(decided[backend].valid, decided["reference"].valid)
        torch.testing.assert_close(decided[backend].margin, decided["reference"].margin)
        assert (column := decided[backend].column) is None or torch.equal(column, columns)
        assert (column is None) == (kind == "mask")
        assert not decided[backend].active[~decided[backend].valid].any()
    with using("triton"):
        rows = [
            pack(decided["triton"].active[..., m], counts=decided["triton"].counts[m], capacity=30)  # type: ignore[index]
            for m in range(modules)
        ]
    with using("reference"):
        expected = [pack(decided["reference"].active[..., m], capacity=30) for m in range(modules)]
    for mine, theirs in zip(rows, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True) if a is not None and b is not None)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_precision(dtype: torch.dtype) -> None:
    assert_precise(through({}), lambda seed: inputs_of(1, 2, seed), dtype)


@needs_triton
@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (2, 1030)])
def test_lengths_around_the_tile(shape: tuple[int, int]) -> None:
    x, weight, bias = numbers(*shape, 20), numbers(2, 20, seed=1), numbers(2, seed=2)
    gate = Gate(torch.zeros(1, device=DEVICE), torch.zeros(1, device=DEVICE))
    assert_same(lambda x, w, b: router(x, w, b, gate).score, [x, weight, bias], 2e-5)
    with using("triton"):
        counts = router(x, weight, bias, gate).counts
        active = router(x, weight, bias, gate).active
    assert counts is not None
    assert int(counts.sum()) == int(active.sum())


@needs_triton
def test_padding_is_not_looked_at() -> None:
    inputs = inputs_of(2, 2)
    run = through({"lengths": LENGTHS})
    clean = results(run, inputs, "triton")
    inputs[0][1, 13:] = float("nan")
    dirty = results(run, inputs, "triton")
    for i, (one, two) in enumerate(zip(clean, dirty, strict=True)):
        if i == 1:  # the tokens themselves, passed on
            one, two = one[:, :13], two[:, :13]
        assert torch.equal(one, two)


@needs_triton
def test_what_is_not_a_number_is_active() -> None:
    x, weight, bias, balance, log_temperature = inputs_of(1, 2)
    x[0, 3] = float("nan")
    for backend in ("triton", "eager", "reference"):
        with using(backend):
            out = router(x, weight, bias, Gate(balance, log_temperature))
        assert bool(out.active[0, 3])
        assert bool(out.score[0, 3].isnan())


@needs_triton
def test_the_same_bits_twice() -> None:
    run, inputs = through({}), inputs_of(2, 2)
    assert all(map(torch.equal, results(run, inputs, "triton"), results(run, inputs, "triton")))


@needs_triton
def test_without_a_gradient_of_the_scores_the_rest_goes_through() -> None:
    x, weight, bias, balance, log_temperature = (each.requires_grad_() for each in inputs_of(1, 2))
    with using("triton"):
        out = router(x, weight, bias, Gate(balance.detach(), log_temperature))
    out.x.square().sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * x)
    for each in (weight, bias, log_temperature):
        assert each.grad is not None
        assert not each.grad.any()


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_gradcheck(backend: str) -> None:
    x, weight, bias, balance, log_temperature = (each.double().requires_grad_() for each in inputs_of(2, 2))

    def run(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        with using(backend):
            return through({"lengths": LENGTHS})(*inputs[:3], balance.detach(), inputs[3])

    assert torch.autograd.gradcheck(run, (x, weight, bias, log_temperature), fast_mode=True)


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_batches_without_tokens(backend: str, shape: tuple[int, int]) -> None:
    weight = torch.randn(2, 4, requires_grad=True)
    with using(backend):
        out = router(torch.randn(*shape, 4), weight, torch.zeros(2), Gate(torch.zeros(1)))
    assert out.score.shape == out.active.shape == (*shape, 1)
    (grad,) = torch.autograd.grad(out.score.sum(), weight)
    assert not grad.any()


def test_bad_input() -> None:
    x, gate = torch.randn(2, 3, 4), Gate(torch.zeros(2))
    with pytest.raises(ShapeError, match=r"must agree, got \(2, 3, 4\), \(2, 5\) and \(2,\)"):
        router(x, torch.randn(2, 5), torch.zeros(2), gate)
    with pytest.raises(ShapeError, match="one or two rows for each of 2 modules, got 3"):
        router(x, torch.randn(3, 4), torch.zeros(3), gate)
    valid, lengths = torch.ones(2, 3, dtype=torch.bool), torch.tensor([1, 2])
    with pytest.raises(ShapeError, match="together with valid"):
        router(x, torch.randn(2, 4), torch.zeros(2), gate, valid=valid, lengths=lengths)
    with pytest.raises(ShapeError, match=r"valid must be \(2, 3\), got \(2, 2\)"):
        router(x, torch.randn(2, 4), torch.zeros(2), gate, valid=valid[:, :2])
    with pytest.raises(ShapeError, match=r"lengths must be \(2,\), got \(1,\)"):
        router(x, torch.randn(2, 4), torch.zeros(2), gate, lengths=lengths[:1])


@needs_triton
def test_operators_are_sound() -> None:
    from sma.ops.router import triton_kernel as kernels

    x, weight, bias, balance, log_temperature = inputs_of(2, 2)
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    for valid, lengths in ((None, None), (mask_of(2, 40), None), (None, LENGTHS)):
        calls.append((kernels.forward, (x, weight, bias, balance, log_temperature, valid, lengths, 1.0, 0.5)))
    score, _, margin, *_ = kernels.forward(*calls[0][1])
    for passed in (None, x):
        calls.append((kernels.backward, (x, weight, log_temperature, score, margin, score, passed, 1.0)))
    for call, arguments in calls:
        torch.library.opcheck(call.operator, arguments, test_utils=("test_schema", "test_faketensor"))


@needs_triton
def test_compiles_in_one_graph() -> None:
    run, inputs = through({"lengths": LENGTHS}), inputs_of(1, 2)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(results(compiled, inputs, "triton"), results(run, inputs, "triton"), strict=True):
        torch.testing.assert_close(actual, expected)


@needs_triton
def test_kernels_fit_the_hardware() -> None:
    from sma.ops.router import triton_kernel as kernels

    tensors = dict.fromkeys(("weight", "bias", "balance", "log_temperature", "score", "margin"), "*fp32")
    numbers_of = {"tokens": "i32", "length": "i32", "temperature": "fp32", "threshold": "fp32"}
    forward = {"x": "*bf16", "valid": "*i64", "active": "*i1", "seen": "*i1", "column": "*i64", "counts": "*i32"}
    backward = {"x": "*bf16", "grad_x": "*bf16", "grad_score": "*fp32", "shares": "*fp32"}
    backward |= {"rows": "*bf16", "row": "*i32"}
    asked: list[Compilation] = []
    for d, modules, pairs in ((128, 1, True), (616, 1, True), (80, 2, True), (2048, 8, False)):
        common = {"D": d, "M": modules, "PAIRS": pairs, "LEARNED": True}
        once = {**common, "MASK": 2, "EACH": 32, "BLOCK_T": kernels.FORWARD_T, "BLOCK_D": kernels.FORWARD_D}
        block_t, block_d = kernels.backward_sizes(d)
        back = {**common, "TOKENS": 256, "BLOCK_T": block_t, "BLOCK_D": block_d}
        module, options = "sma.ops.router.triton_kernel", {"num_warps": kernels.WARPS}
        asked.append(Compilation(module, "forward_kernel", {**tensors, **numbers_of, **forward}, once, options))
        for rows in (False, True):
            flags, options = {"HAS_THROUGH": not rows, "HAS_ROWS": rows}, {"num_warps": kernels.WARPS}
            types = {**tensors, **numbers_of, **backward}
            asked.append(Compilation(module, "backward_kernel", types, {**back, **flags}, options))
    packing = dict.fromkeys(("index", "where", "position", "cu_seqlens", "overflow"), "*i64")
    packing |= dict.fromkeys(("mask", "kept"), "*i1") | dict.fromkeys(("counts", "row"), "*i32")
    packing |= dict.fromkeys(("total", "length", "batch", "blocks", "rows", "step", "stride"), "i32")
    for block in (256, 1024):
        flags = {"HAS_POSITION": True, "SPARE": True, "EACH": 32, "BLOCK": block}
        asked.append(Compilation("sma.ops.pack.triton_kernel", "place_kernel", packing, flags, {"num_warps": 4}))
    for compilation, resources in zip(asked, compile_all(asked), strict=True):
        assert resources.spilled <= 64, compilation
        assert resources.shared < 100_000, compilation


def layer_of(configurator: Configurator) -> SparseMixture:
    torch.manual_seed(0)
    members = [nn.Linear(8, 8) for _ in range(configurator.n_modules)]
    return SparseMixture(members, configurator, d_model=8).to(DEVICE)


@needs_triton
@pytest.mark.parametrize("config", [TemperedSoftmax.Config(), Sigmoid.Config(temperature=0.7, threshold=0.55)])
@pytest.mark.parametrize("capacity", [None, 0.3])
def test_a_layer_on_kernels_is_the_eager_layer(config: Configurator.Config, capacity: float | None) -> None:
    valid = mask_of(2, 40, 0.8)
    outcomes: dict[str, list[Tensor]] = {}
    for backend in ("triton", "eager"):
        layer, x = layer_of(config.build(n_modules=2)).with_capacity(capacity), numbers(2, 40, 8).requires_grad_()
        with using(backend):
            out = layer(x, valid=valid)
            out.output.square().sum().backward()
        assert x.grad is not None
        outcomes[backend] = [out.output, out.routing.confidence * out.routing.active, out.routing.active.float()]
        outcomes[backend] += [x.grad, *(each.grad for each in layer.parameters() if each.grad is not None)]
        assert len(outcomes[backend]) == 4 + len(list(layer.parameters()))
    for one, two in zip(outcomes["triton"], outcomes["eager"], strict=True):
        two = two.detach()
        assert error_of(one, two)[0] <= 1e-5 * max(1.0, float(two.abs().max()))


@needs_triton
@pytest.mark.parametrize("modules", [1, 2])
@pytest.mark.parametrize("capacity", [None, 0.3, 1.0])
@pytest.mark.parametrize("used", [each for each in itertools.product((False, True), repeat=3) if any(each)])
def test_router_and_compress_share_a_backward(modules: int, capacity: float | None, used: tuple[bool, ...]) -> None:
    """Whichever of tokens, scores (also those of tokens that are not active) and the rest of x has a gradient."""
    outcomes: dict[str, list[Tensor]] = {}
    for backend in ("triton", "eager"):
        layer = layer_of(TemperedSoftmax.Config().build(n_modules=modules)).with_capacity(capacity)
        x = numbers(2, 40, 8).requires_grad_()
        with using(backend):
            parts = layer.run_members(x, valid=mask_of(2, 40, 0.8))
            places = [
                packed.index.clamp(max=79)[:, None] * (packed.index < 80)[:, None] for _, packed, _ in parts.members
            ]
            several = zip(parts.members, places, strict=True)
            losses = (
                sum(((each.output.cos() * place).sum() for each, place in several), torch.zeros((), device=DEVICE)),
                (parts.routing.confidence[..., 0] * numbers(2, 40, seed=3)).sum(),
                (parts.x @ numbers(8, 8, seed=4)).sin().sum(),
            )
            loss = sum(
                (each for each, there in zip(losses, used, strict=True) if there), torch.zeros((), device=DEVICE)
            )
            wanted = [x, layer.router.weight, layer.router.bias, layer.configurator.temp]
            grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        outcomes[backend] = [torch.zeros_like(at) if g is None else g for g, at in zip(grads, wanted, strict=True)]
    for one, two in zip(outcomes["triton"], outcomes["eager"], strict=True):
        assert error_of(one, two)[0] <= 1e-5 * max(1.0, float(two.abs().max()))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_shared_backward_is_precise(dtype: torch.dtype) -> None:
    packed, seen = Packed.from_mask(mask_of(2, 40)), mask_of(2, 40)[..., None]

    def run(x: Tensor, weight: Tensor, bias: Tensor, balance: Tensor, log_temperature: Tensor) -> tuple[Tensor, Tensor]:
        routed, compress = routed_compress(x, weight, bias, Gate(balance.detach(), log_temperature))
        tokens, score = compress_plain(routed.x, packed), routed.score
        if compress is not None:
            tokens, _, score = compress(packed)
        return tokens, score * seen + 0 * balance.sum()

    assert_precise(run, lambda seed: inputs_of(1, 2, seed), dtype)


@needs_triton
@pytest.mark.parametrize("capacity", [None, 0.5])
def test_a_replayed_or_checkpointed_decision_on_kernels(capacity: float | None) -> None:
    layer = layer_of(TemperedSoftmax.Config().build(n_modules=1)).with_capacity(capacity)
    x = numbers(2, 40, 8).requires_grad_()
    with using("triton"):
        plain = layer(x)
        other = torch.rand(2, 40, 1, device=DEVICE) < 0.5
        again = layer(x, replay=plain.routing.detach())
        replayed = layer(x, replay=replace(plain.routing.detach(), active=other))
        saved = checkpoint(layer, x)
        (expected,) = torch.autograd.grad(plain.output.square().sum(), x)
        (actual,) = torch.autograd.grad(saved.output.square().sum(), x)
    assert torch.equal(again.output, plain.output)
    assert torch.equal(replayed.routing.active, other)
    assert torch.equal(replayed.routing.packed[0].index, other.flatten().nonzero().squeeze(1))
    assert torch.equal(saved.output, plain.output)
    assert torch.equal(actual, expected)


class TheOtherOnes(TemperedSoftmax):
    def decide(self, score: Tensor, position: Tensor, valid: Tensor) -> Tensor:
        return ~super().decide(score, position, valid)


class SaysSo(TheOtherOnes):
    def gate(self) -> Gate | None:
        return Gate(self.balance)


def test_only_what_a_gate_says_is_fused() -> None:
    plain = TemperedSoftmax.Config().build(n_modules=1)
    assert gate_of(plain) is not None
    assert gate_of(TheOtherOnes.Config().build(n_modules=1)) is None
    assert gate_of(SaysSo.Config().build(n_modules=1)) is not None
    plain.decide = lambda score, *_: score > 2
    assert gate_of(plain) is None
    assert not layer_of(plain)(numbers(1, 5, 8)).routing.active.any()


def test_a_step_that_a_subclass_changed_is_taken() -> None:
    x = numbers(2, 40, 8)
    usual = layer_of(TemperedSoftmax.Config().build(n_modules=1))(x).routing.active
    other = layer_of(TheOtherOnes.Config().build(n_modules=1))(x).routing.active
    assert usual.any()
    assert torch.equal(other, ~usual)
