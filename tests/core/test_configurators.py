"""The formula of each configurator, thresholds, ties, balance, rate losses and the controller of the rate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sma.configurators import (
    ExpertChoice,
    FixedRate,
    GumbelSoftmax,
    RateController,
    RateLoss,
    Sigmoid,
    TemperedSoftmax,
    TopK,
)
from sma.errors import ConfigError
from sma.interfaces import Configurator
from sma.layer import SparselyActivated, SparseMixture
from sma.routing import Routing


def decide(configurator: Configurator, logits: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Score, decision and confidence for logits ``(B, L, M, C)``."""
    position = torch.arange(logits.shape[1]).expand(logits.shape[:2])
    valid = torch.ones(logits.shape[:2], dtype=torch.bool) if valid is None else valid
    score = configurator.score(logits, position)
    active = configurator.decide(score.detach(), position, valid)
    return score, active, configurator.weigh(score, active)


def test_tempered_softmax() -> None:
    configurator = TemperedSoftmax.Config(init_temp=0.3).build(n_modules=2)
    configurator.reset(16)
    assert configurator.temp.item() == pytest.approx(math.log(0.3 * 4))
    logits = torch.randn(2, 5, 2, 2, dtype=torch.float64)
    _, active, confidence = decide(configurator, logits)
    expected = (logits / (0.3 * 4)).softmax(-1)[..., 1]
    torch.testing.assert_close(confidence, expected, rtol=1e-6, atol=0)
    assert torch.equal(active, logits[..., 1] > logits[..., 0])


def test_tempered_softmax_learns_its_temperature() -> None:
    configurator = TemperedSoftmax.Config().build(n_modules=1).double()
    logits = torch.tensor([[[[0.0, 1.0]]]], dtype=torch.float64)
    score, _, _ = decide(configurator, logits)
    score.sum().backward()
    # d sigmoid(1 / exp(t)) / dt at t = 0
    expected = -score.item() * (1 - score.item())
    assert configurator.temp.grad.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "configurator",
    [TemperedSoftmax.Config(), GumbelSoftmax.Config(), Sigmoid.Config()],
    ids=lambda c: type(c).owner.__name__,
)
def test_a_tie_is_inactive_and_nan_is_active(configurator: Any) -> None:
    built = configurator.build(n_modules=1).eval()
    width = built.logits_per_module
    assert not decide(built, torch.zeros(1, 1, 1, width))[1].any()
    assert decide(built, torch.full((1, 1, 1, width), float("nan")))[1].all()


def test_sigmoid() -> None:
    configurator = Sigmoid.Config(temperature=2.0, threshold=0.7).build(n_modules=1)
    edge = 2.0 * math.log(0.7 / 0.3)
    logits = torch.tensor([edge - 1e-3, edge + 1e-3, 10.0], dtype=torch.float64).view(1, 3, 1, 1)
    _, active, confidence = decide(configurator, logits)
    assert active.flatten().tolist() == [False, True, True]
    torch.testing.assert_close(confidence[..., 0], torch.sigmoid(logits[..., 0, 0] / 2.0))


def test_gumbel_softmax_draws_in_proportion() -> None:
    configurator = GumbelSoftmax.Config(temperature=0.7).build(n_modules=1)
    logits = torch.tensor([0.0, 1.0]).expand(1, 20000, 1, 2)
    torch.manual_seed(0)
    _, active, confidence = decide(configurator.train(), logits)
    # P(u1 + g1 > u0 + g0) = softmax(u)[1], whatever the temperature
    assert active.float().mean().item() == pytest.approx(torch.tensor([0.0, 1.0]).softmax(0)[1].item(), abs=0.015)
    assert torch.equal(confidence > 0.5, active)
    _, active, confidence = decide(configurator.eval(), logits)
    assert active.all()
    torch.testing.assert_close(confidence, torch.full_like(confidence, torch.sigmoid(torch.tensor(1 / 0.7)).item()))


def test_gumbel_softmax_straight_through() -> None:
    soft = GumbelSoftmax.Config().build(n_modules=1).eval()
    hard = GumbelSoftmax.Config(hard=True).build(n_modules=1).eval()
    logits = torch.randn(2, 5, 1, 2, requires_grad=True)
    _, _, soft_confidence = decide(soft, logits)
    _, _, hard_confidence = decide(hard, logits)
    torch.testing.assert_close(hard_confidence, torch.ones_like(hard_confidence))
    one, other = (torch.autograd.grad(c.sum(), logits)[0] for c in (soft_confidence, hard_confidence))
    assert torch.equal(one, other)


def test_top_k_of_modules() -> None:
    logits = torch.randn(2, 4, 5, 1)
    p = logits[..., 0].softmax(-1)
    best = p.topk(2, -1).indices
    expected = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, best, True)
    for renormalise in (False, True):
        _, active, confidence = decide(TopK.Config(k=2, renormalise=renormalise).build(n_modules=5), logits)
        assert torch.equal(active, expected)
        chosen = (p * expected).sum(-1, keepdim=True)
        torch.testing.assert_close(confidence[active], (p / chosen if renormalise else p)[active])


def test_top_k_ties_go_to_the_first_module() -> None:
    _, active, confidence = decide(TopK.Config(k=2).build(n_modules=4), torch.zeros(1, 3, 4, 1))
    assert active.tolist() == [[[True, True, False, False]] * 3]
    torch.testing.assert_close(confidence[active], torch.full((6,), 0.5))


@pytest.mark.parametrize("config", [TopK.Config(over="sequence", rate=0.25), ExpertChoice.Config(rate=0.25)])
def test_choice_over_the_sequence(config: Any) -> None:
    logits = torch.randn(3, 12, 1, 1)
    valid = torch.ones(3, 12, dtype=torch.bool)
    valid[1, 5:] = False
    valid[2] = False
    _, active, confidence = decide(config.build(n_modules=1), logits, valid)
    active = active & valid[..., None]
    for row, n in enumerate((12, 5, 0)):
        quota = math.ceil(0.25 * n)
        assert active[row].sum() == quota
        assert set(active[row, :, 0].nonzero().flatten().tolist()) == set(
            logits[row, :n, 0, 0].topk(quota).indices.tolist()
        )
    torch.testing.assert_close(confidence, logits[..., 0].sigmoid())


def test_ties_over_the_sequence_go_to_the_earlier_token() -> None:
    _, active, _ = decide(ExpertChoice.Config(rate=0.5).build(n_modules=2), torch.zeros(1, 6, 2, 1))
    assert active[0, :, 0].tolist() == [True] * 3 + [False] * 3


def test_expert_choice_scores_are_affinities() -> None:
    logits = torch.randn(1, 6, 3, 1)
    _, _, confidence = decide(ExpertChoice.Config().build(n_modules=3), logits)
    torch.testing.assert_close(confidence, logits[..., 0].softmax(-1))


@given(rate=st.floats(0.01, 1.0), length=st.integers(0, 300))
def test_quota_of_a_sequence(rate: float, length: int) -> None:
    _, active, _ = decide(TopK.Config(over="sequence", rate=rate).build(n_modules=1), torch.zeros(1, length, 1, 1))
    assert abs(int(active.sum()) - rate * length) < 1 + 1e-6
    assert int(active.sum()) >= rate * length - 1e-6


@given(rate=st.floats(0.0, 1.0), length=st.integers(1, 200))
def test_fixed_rate_is_evenly_spread(rate: float, length: int) -> None:
    _, active, confidence = decide(FixedRate.Config(rate=rate).build(n_modules=2), torch.zeros(1, length, 2, 0))
    counts = active[0, :, 0].long().cumsum(0)
    expected = torch.arange(1, length + 1, dtype=torch.float64) * rate
    assert float((counts - expected).abs().max()) <= 1 + 1e-9
    assert torch.equal(active[..., 0], active[..., 1])
    assert torch.equal(confidence, torch.ones_like(confidence))


@pytest.mark.parametrize("config", [Sigmoid.Config(), TemperedSoftmax.Config(), GumbelSoftmax.Config()])
def test_balance_is_an_offset_of_the_logit(config: Any) -> None:
    configurator = config.build(n_modules=1).eval()
    logits = torch.randn(1, 6, 1, configurator.logits_per_module)
    moved = logits.clone()
    moved[..., -1] += 0.7
    expected = decide(configurator, moved)
    configurator.balance.fill_(0.7)
    for one, other in zip(decide(configurator, logits), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_balance_of_experts_moves_the_choice_not_the_confidence() -> None:
    configurator = TopK.Config(k=1, renormalise=False).build(n_modules=3)
    logits = torch.randn(1, 20, 3, 1)
    before, _, _ = decide(configurator, logits)
    configurator.balance.copy_(torch.tensor([0.0, 2.0, 0.0]))
    after, active, _ = decide(configurator, logits)
    assert torch.equal(before, after)
    assert active[..., 1].all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: TemperedSoftmax.Config(init_temp=0.0), "init_temp: must be positive, got 0.0"),
        (lambda: Sigmoid.Config(threshold=1.0), "threshold: must lie strictly between 0 and 1, got 1.0"),
        (lambda: Sigmoid.Config(temperature=-1.0), "temperature: must be positive"),
        (lambda: GumbelSoftmax.Config(temperature=0.0), "temperature: must be positive"),
        (lambda: TopK.Config(k=0), "k: must be at least 1, got 0"),
        (lambda: TopK.Config(over="batch"), "over: must be 'modules' or 'sequence', got 'batch'"),  # type: ignore[arg-type]
        (lambda: TopK.Config(k=3).build(n_modules=2), "k: must be at most the number of modules, 2, got 3"),
        (lambda: ExpertChoice.Config(rate=1.5), r"rate: must lie in \(0, 1\], got 1.5"),
        (lambda: FixedRate.Config(rate=-0.1), r"rate: must lie in \[0, 1\], got -0.1"),
        (lambda: RateLoss.Config(target=0.0), "target: must lie strictly between 0 and 1, got 0.0"),
        (lambda: RateLoss.Config(target=0.5, weight=-1.0), "weight: must not be negative"),
        (lambda: RateController.Config(target=0.5, gain=0.0), "gain: must be positive"),
    ],
)
def test_values_out_of_range_are_refused(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config()


# Holding a rate


def routing_at(rate: float, length: int = 100) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, a decision with exactly that share of active tokens, and ``valid`` with padding that must not count."""
    score = torch.rand(2, length, 1, dtype=torch.float64, requires_grad=True)
    active = torch.zeros(2, length, 1, dtype=torch.bool)
    active[:, : round(rate * length)] = True
    valid = torch.ones(2, length + 7, dtype=torch.bool)
    valid[:, length:] = False
    padding = torch.full((2, 7, 1), float("nan"), dtype=torch.float64)
    return torch.cat([score, padding], 1), torch.cat([active, torch.ones(2, 7, 1, dtype=torch.bool)], 1), valid


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.9, 1.0])
def test_values_of_the_rate_losses(rate: float) -> None:
    target = 0.3
    score, active, valid = routing_at(rate)
    values = {
        kind: RateLoss(RateLoss.Config(target=target, kind=kind, weight=2.0))(score, active, valid).item()  # type: ignore[arg-type]
        for kind in ("squared", "hinge", "cross_entropy")
    }
    assert values["squared"] == pytest.approx(2 * (rate - target) ** 2)
    assert values["hinge"] == pytest.approx(2 * max(0.0, rate - target))
    inside = min(max(rate, 1e-4), 1 - 1e-4)
    expected = target * math.log(target / inside) + (1 - target) * math.log((1 - target) / (1 - inside))
    assert values["cross_entropy"] == pytest.approx(2 * expected, abs=1e-9)


@pytest.mark.parametrize(
    ("kind", "slope"), [("squared", 2 * 0.4), ("hinge", 1.0), ("cross_entropy", -0.3 / 0.7 + 0.7 / 0.3)]
)
def test_gradients_of_the_rate_losses(kind: Any, slope: float) -> None:
    score, active, valid = routing_at(0.7)
    loss = RateLoss(RateLoss.Config(target=0.3, kind=kind))(score, active, valid)
    (grad,) = torch.autograd.grad(loss, score)
    # the mean score stands in for the rate: each of 200 real tokens has a 200th of the slope
    torch.testing.assert_close(grad[:, :100], torch.full_like(grad[:, :100], slope / 200))
    assert not grad[:, 100:].any(), "padding has a gradient"


@pytest.mark.parametrize("kind", ["squared", "cross_entropy"])
def test_a_rate_loss_pulls_from_both_ends(kind: Any) -> None:
    for rate, sign in ((0.0, -1), (1.0, 1)):
        score, active, valid = routing_at(rate)
        (grad,) = torch.autograd.grad(RateLoss(RateLoss.Config(target=0.3, kind=kind))(score, active, valid), score)
        assert (grad[:, :100].sign() == sign).all()
        assert grad.isfinite().all()


def test_a_layer_trained_on_the_rate_loss_reaches_its_target() -> None:
    torch.manual_seed(0)
    layer = SparselyActivated(nn.Linear(8, 8), rate_loss=RateLoss(RateLoss.Config(target=0.2)))
    x = torch.randn(8, 64, 8)
    optimiser = torch.optim.Adam(layer.parameters(), 0.02)
    for _ in range(150):
        optimiser.zero_grad()
        out = layer(x)
        out.losses["rate"].backward()
        optimiser.step()
    assert float(out.routing.rate().mean()) == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize("config", [TemperedSoftmax.Config(), Sigmoid.Config(), GumbelSoftmax.Config()])
def test_the_controller_reaches_its_target_without_a_gradient(config: Any) -> None:
    torch.manual_seed(0)
    layer = SparseMixture([nn.Linear(8, 8)] * 2, config.build(n_modules=2))
    controller = RateController(RateController.Config(target=0.25, gain=0.03))
    before = {name: value.clone() for name, value in layer.state_dict().items() if "balance" not in name}
    with torch.no_grad():
        for _ in range(200):
            x = torch.randn(4, 64, 8)
            routing = layer(x).routing
            controller.update(layer.configurator, routing)
    assert routing.active.float().mean((0, 1)).tolist() == pytest.approx([0.25, 0.25], abs=0.1)
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())


def test_one_step_of_the_controller() -> None:
    configurator = Sigmoid.Config().build(n_modules=2)
    active = torch.zeros(2, 5, 2, dtype=torch.bool)
    active[0, :3, 0] = True
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[1, 1:] = False
    routing = Routing(active, active.float(), valid, torch.zeros(2, 5, dtype=torch.int64))
    RateController(RateController.Config(target=0.4, gain=0.5)).update(configurator, routing)
    # six real tokens, three of them active for the first module
    torch.testing.assert_close(configurator.balance, torch.tensor([0.5 * (0.4 - 0.5), 0.5 * 0.4]))
