"""A fixed number of rows: the same results while the capacity suffices, a count of dropped tokens, static shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sma
from sma.configurators import Always, FixedRate
from sma.errors import ConfigError
from sma.layer import SparselyActivated, SparseMixture
from sma.ops import using
from sma.routing import Packed
from sma.testing.base import gradients
from sma.working_memory import WorkingMemory
from sma_modules.modules.ffn import FFN
from sma_modules.modules.gau import GAU
from sma_modules.modules.moe import MoE


def attention(causal: bool = False) -> GAU:
    gau: GAU = GAU.Config(d_qk=4, window=3, positions="simple", max_positions=8).build(d_model=8, causal=causal)
    return gau


def run(layer: SparseMixture, x: Tensor, valid: Tensor | None) -> tuple[Tensor, dict[str, Tensor | None], Tensor]:
    x = x.detach().requires_grad_()
    out = layer(x, valid=valid)
    weights = torch.linspace(-1, 1, out.output.numel(), dtype=x.dtype).view_as(out.output)
    return out.output.detach(), gradients((out.output * weights).sum(), layer, x), out.routing.active


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_the_same_while_there_is_room(several: bool, padded: bool, backend: str) -> None:
    modules: list[nn.Module] = [attention(), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))]
    layer = (SparseMixture(modules) if several else SparselyActivated(modules[0])).double()
    x = torch.randn(3, 11, 8, dtype=torch.float64)
    valid = torch.arange(11) < torch.tensor([11, 0, 5])[:, None] if padded else None
    with using(backend):
        expected, grads, active = run(layer, x, valid)
        most = float(active.sum((0, 1)).max()) / active[..., 0].numel()
        for share in (most, 1.0):
            y, again, same = run(layer.with_capacity(share), x, valid)
            torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
            assert torch.equal(same, active)
            for name, grad in grads.items():
                torch.testing.assert_close(again[name], grad, rtol=1e-10, atol=1e-10)


def test_what_finds_no_room_is_counted_and_not_active() -> None:
    layer = SparselyActivated(nn.Linear(4, 4), Always(Always.Config()), d_model=4).with_capacity(0.25)
    x = torch.randn(2, 10, 4)
    out = layer(x)
    assert out.routing.overflow is not None
    assert out.routing.overflow.tolist() == [15]
    assert out.routing.active[..., 0].flatten().tolist() == [True] * 5 + [False] * 15
    assert torch.equal(out.output[0, :5], layer.module(x[0, :5]))
    assert not out.output[0, 5:].any()
    assert not out.output[1].any()


def test_nothing_active_leaves_all_rows_empty() -> None:
    layer = SparselyActivated(attention(), FixedRate(FixedRate.Config(rate=0.0)), d_model=8).with_capacity(0.5)
    x = torch.randn(2, 6, 8, requires_grad=True)
    out = layer(x)
    out.output.sum().backward()
    assert not out.output.any()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all() for parameter in layer.module.parameters()
    )


def test_streams_ignore_it() -> None:
    layer = SparselyActivated(attention(causal=True), causal=True, d_model=8).with_capacity(0.1)
    x = torch.randn(2, 10, 8)
    whole = SparselyActivated(layer.module, layer.configurator, causal=True, d_model=8)
    whole.load_state_dict(layer.state_dict())
    streamed = layer(x, layer.initial_state(2, x))
    assert streamed.routing.overflow is None
    torch.testing.assert_close(streamed.output, whole(x).output)


def test_shapes_do_not_depend_on_the_decision() -> None:
    for rate in (0.0, 0.3, 1.0):
        mask = torch.rand(3, 10) < rate
        packed = Packed.from_mask(mask, capacity=12)
        assert (packed.index.shape, packed.position.shape, packed.cu_seqlens.shape) == ((12,), (12,), (5,))
        assert packed.max_length == 12
        assert packed.real is not None
        assert int(packed.real.sum()) + int(packed.overflow or 0) == min(int(mask.sum()), 12) + max(
            int(mask.sum()) - 12, 0
        )


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(ConfigError, match=rf"capacity must lie in \(0, 1\] or be None, got {share}"):
        SparselyActivated(nn.Linear(4, 4)).with_capacity(share)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.TransformerEncoderLayer(8, 2, batch_first=True), "takes rows as long as the longest sequence"),
        (nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), "normalises over all rows"),
        (MoE.Config(n_experts=2).build(d_model=8), "MoE computes a loss over all rows; padding rows would change it"),
    ],
    ids=["padded", "batch norm", "experts"],
)
def test_modules_that_would_notice_are_refused(module: nn.Module, reason: str) -> None:
    layer = SparselyActivated(module)
    with pytest.raises(ConfigError, match=reason):
        layer.with_capacity(0.5)
    assert layer.capacity is None
    assert layer.with_capacity(None) is layer


def test_in_a_spec() -> None:
    tokens = torch.randint(256, (2, 30))
    exact = sma.build("seqboat_small_lm", "n_layers=2", "d_model=16").eval()
    fixed = sma.build("seqboat_small_lm", "n_layers=2", "d_model=16", "blocks[0].activate.capacity=1.0").eval()
    fixed.load_state_dict(exact.state_dict())
    out = fixed(tokens)
    torch.testing.assert_close(out.logits, exact(tokens).logits)
    assert all(routing.overflow is not None and not routing.overflow.any() for routing in out.routings.values())
    with pytest.raises(sma.spec.SpecError if hasattr(sma.spec, "SpecError") else ConfigError, match="capacity"):
        sma.build("seqboat_small_lm", "blocks[0].activate.capacity=0")


def test_a_layer_of_fixed_shape_compiles_in_one_graph() -> None:
    ffn = FFN.Config(d_hidden=8).build(d_model=4)
    layer = SparselyActivated(ffn, d_model=4).with_capacity(1.0)
    x = torch.randn(2, 6, 4)
    expected = layer(x)
    torch._dynamo.reset()
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(out.output, expected.output)


def test_a_replayed_decision_is_not_cut() -> None:
    layer = SparselyActivated(nn.Linear(4, 4), d_model=4)
    x = torch.randn(2, 10, 4)
    everything = layer(x).routing
    everything = sma.Routing(
        torch.ones_like(everything.active), everything.confidence, everything.valid, everything.position
    )
    replayed = layer.with_capacity(0.1)(x, replay=everything)
    assert replayed.routing.active.all()
    assert replayed.routing.overflow is None


def test_streams_obey_it_only_where_they_are_asked_to() -> None:
    layer = SparselyActivated(attention(causal=True), Always(Always.Config()), causal=True).with_capacity(0.25)
    x = torch.randn(2, 8, 8)
    assert layer(x, layer.initial_state(2, x)).routing.overflow is None
    out = layer.with_capacity(0.25, streams=True)(x, layer.initial_state(2, x))
    assert out.routing.overflow.tolist() == [12]
    assert out.state.members[0].count.tolist() == [4, 0]
    assert out.state.seen.tolist() == [8, 8]


@pytest.mark.parametrize("active", [[[True, False, True], [False, False, False]], [[False] * 3] * 2, [[True] * 3] * 2])
def test_a_memory_of_fixed_shape_remembers_the_same(active: list[list[bool]]) -> None:
    mask, rows, memory = torch.tensor(active), torch.randn(6, 2), WorkingMemory.empty(2, 4, torch.zeros(0, 2))
    for _ in range(3):
        free, fixed = Packed.from_mask(mask), Packed.from_mask(mask, capacity=6)
        ours, theirs = memory.append(free, rows[: free.index.numel()]), memory.append(fixed, rows)
        real = int(ours.cu_seqlens[-1])
        assert theirs.rows[0].shape == (2 * 4 + 6, 2)
        assert torch.equal(theirs.rows[0][:real], ours.rows[0])
        assert theirs.cu_seqlens.tolist() == [*ours.cu_seqlens.tolist(), 14]
        assert theirs.start.tolist() == [*ours.start.tolist(), 0]
        for one, other in zip(ours.memory.tensors(), theirs.memory.tensors(), strict=True):
            assert torch.equal(one, other)
        memory = theirs.memory
