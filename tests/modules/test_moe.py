"""The mixture of experts and the sorted matrix product under it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sma import ModuleOutput
from sma.errors import ConfigError, ShapeError
from sma.ops import using
from sma_modules.modules.moe import MoE
from sma_modules.ops.expert_matmul import expert_matmul
from sma_modules.ops.expert_order import combine, dispatch, order_by_expert


def build(**options: Any) -> MoE:
    moe: MoE = MoE.Config(**{"n_experts": 4, "d_hidden": 6, **options}).build(d_model=5)
    return moe.double()


def plain(moe: MoE, x: Tensor) -> Tensor:
    """The definition, token by token."""
    rows = []
    for token in x:
        p = F.softmax(moe.router.weight @ token, dim=0)
        best = sorted(range(len(p)), key=lambda e: -p[e].item())[: moe.config.top_k]
        total = sum(p[e] for e in best) if moe.config.renormalise else 1
        y = torch.zeros_like(token)
        for e in best:
            hidden = token @ moe.up[e]
            hidden = moe.act(token @ moe.gate[e]) * hidden if moe.gate is not None else moe.act(hidden)
            y = y + p[e] / total * (hidden @ moe.down[e])
        rows.append(y if moe.shared is None else y + moe.shared(token[None])[0])
    return torch.stack(rows)


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize(
    "options",
    [{}, {"gated": False, "activation": "relu"}, {"top_k": 1, "renormalise": False}, {"top_k": 4, "d_shared": 3}],
)
def test_is_the_definition(options: dict[str, Any], backend: str) -> None:
    moe = build(**options)
    x = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    grad_y = torch.randn_like(x)
    with using(backend):
        out = moe(x)
    assert isinstance(out, ModuleOutput)
    inputs = [x, *moe.parameters()]
    want = plain(moe, x)
    torch.testing.assert_close(out.output, want)
    actual = torch.autograd.grad(out.output, inputs, grad_y)
    for a, b in zip(actual, torch.autograd.grad(want, inputs, grad_y), strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck() -> None:
    moe = build(d_shared=2, load_balance_weight=1.0, z_loss_weight=1.0)
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in moe.named_parameters()]

    def function(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        out = torch.func.functional_call(moe, dict(zip(names, weights, strict=True)), x)
        return out.output, *out.losses.values()

    assert torch.autograd.gradcheck(function, (x, *moe.parameters()))


def test_losses() -> None:
    moe = build(load_balance_weight=0.5, z_loss_weight=0.25)
    x = torch.randn(9, 5, dtype=torch.float64)
    logits = x @ moe.router.weight.T
    p = logits.softmax(-1)
    chosen = torch.zeros(4, dtype=torch.float64)
    for row in p.topk(2).indices.flatten().tolist():
        chosen[row] += 1 / 18
    losses = moe(x).losses
    torch.testing.assert_close(losses["load_balance"], 0.5 * 4 * (chosen * p.mean(0)).sum())
    torch.testing.assert_close(losses["router_z"], 0.25 * (logits.exp().sum(-1).log() ** 2).mean())
    with torch.no_grad():
        moe.router.weight.zero_()  # all experts alike: perfectly balanced probabilities
    torch.testing.assert_close(moe(x).losses["load_balance"], torch.tensor(0.5, dtype=torch.float64))


def test_a_token_does_not_see_its_batch_mates() -> None:
    moe = build()
    x = torch.randn(20, 5, dtype=torch.float64)
    x[3:] = x[3]  # a crowd that wants the same experts
    y = moe(x).output
    for t in range(5):
        torch.testing.assert_close(moe(x[t : t + 1]).output[0], y[t])
    order = torch.randperm(20)
    torch.testing.assert_close(moe(x[order]).output, y[order])


def test_no_tokens() -> None:
    moe = build(d_shared=3)
    out = moe(torch.zeros(0, 5, dtype=torch.float64))
    assert out.output.shape == (0, 5)
    assert all(loss == 0 for loss in out.losses.values())
    (out.output.sum() + sum(out.losses.values())).backward()
    assert all(p.grad is not None and not p.grad.any() for p in moe.parameters())


def test_an_idle_expert_has_a_zero_gradient() -> None:
    moe = build()
    with torch.no_grad():
        moe.router.weight[2] = -100.0
    out = moe(torch.rand(8, 5, dtype=torch.float64))
    out.output.square().sum().backward()
    for parameter in (moe.up, moe.gate, moe.down):
        assert parameter is not None
        assert parameter.grad is not None
        assert not parameter.grad[2].any()
        assert parameter.grad[[0, 1, 3]].any()


def test_deterministic() -> None:
    moe = build().float()
    x = torch.randn(64, 5, requires_grad=True)
    runs = []
    torch.use_deterministic_algorithms(True)
    for _ in range(2):
        out = moe(x)
        total = out.output.square().sum() + sum(out.losses.values())
        runs.append([out.output, *torch.autograd.grad(total, [x, *moe.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_ties_go_to_the_first_experts() -> None:
    moe = build()
    with torch.no_grad():
        moe.router.weight.zero_()
    moe(torch.randn(3, 5, dtype=torch.float64)).output.sum().backward()
    assert moe.down.grad is not None
    assert moe.down.grad[:2].any()
    assert not moe.down.grad[2:].any()


@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision_routes_in_float32(autocast: bool) -> None:
    moe = build().float()
    x = torch.randn(30, 5)
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            out = moe(x)
    else:
        x = x.bfloat16()
        moe.bfloat16()
        out = moe(x)
    assert out.losses["router_z"].dtype == torch.float32
    exact = moe.double()(x.double())
    torch.testing.assert_close(out.losses["router_z"].double(), exact.losses["router_z"], rtol=1e-5, atol=0)
    torch.testing.assert_close(out.output.double(), exact.output, rtol=0.05, atol=0.02)


@given(data=st.data())
def test_expert_matmul_eager_equals_reference(data: st.DataObject) -> None:
    counts = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=5)))
    x = torch.randn(int(counts.sum()), 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(counts), 3, 4, dtype=torch.float64, requires_grad=True)
    results = []
    for backend in ("reference", "eager"):
        with using(backend):
            y = expert_matmul(x, weight, counts)
        results.append([y, *torch.autograd.grad(y.sin().sum(), [x, weight])])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@given(data=st.data())
def test_dispatch_and_combine_only_move_rows(data: st.DataObject) -> None:
    n_experts, top_k, tokens = (data.draw(st.integers(1, high)) for high in (4, 3, 6))
    choice = torch.randint(n_experts, (tokens, top_k))
    x = torch.randn(tokens, 2, dtype=torch.float64, requires_grad=True)
    order = order_by_expert(choice, n_experts)
    rows = dispatch(x, order)
    sorted_choice = choice.flatten()[order.order]
    assert torch.equal(sorted_choice, sorted_choice.sort().values)
    assert torch.equal(order.counts, torch.bincount(choice.flatten(), minlength=n_experts))
    assert torch.equal(rows, x[order.order // top_k])
    weight = torch.rand(tokens, top_k, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(combine(rows, weight, order), x * weight.sum(1, keepdim=True))
    assert torch.autograd.gradcheck(lambda x, weight: combine(dispatch(x, order), weight, order), (x, weight))


@pytest.mark.parametrize(
    ("x", "weight", "counts", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(2, 4, 2), torch.tensor([1, 2]), "agree in d_in"),
        (torch.zeros(3, 2), torch.zeros(2, 2, 2).double(), torch.tensor([1, 2]), "dtype"),
        (torch.zeros(3, 2), torch.zeros(2, 2, 2), torch.tensor([1, 1]), r"add up to the 3 rows of x, got \[1, 1\]"),
        (torch.zeros(3, 2), torch.zeros(2, 2, 2), torch.tensor([3]), "one per expert"),
    ],
)
def test_expert_matmul_refuses(x: Tensor, weight: Tensor, counts: Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        expert_matmul(x, weight, counts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_experts": 0}, "n_experts: must be at least 1, got 0"),
        ({"top_k": 9}, r"top_k: must be in 1..n_experts = 8, got 9"),
        ({"top_k": 1}, "renormalise: must be False with top_k 1, got True"),
        ({"d_hidden": 0}, "d_hidden: must be None or at least 1"),
        ({"d_shared": 0}, "d_shared: must be None or at least 1"),
        ({"activation": "x"}, "activation: must be one of"),
        ({"z_loss_weight": -1.0}, "z_loss_weight: must not be negative"),
        ({"load_balance_weight": -1.0}, "load_balance_weight: must not be negative"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoE.Config(**options)
