"""The suite of configurators."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sma.decision import gate_of
from sma.errors import ConfigError
from sma.interfaces import Configurator
from sma.layer import SparseMixture
from sma.testing.base import few, law
from sma.testing.suites import _LayerSuite


class ConfiguratorSuite(_LayerSuite):
    """The laws of a configurator, alone and over ``n_modules`` linear modules in a mixture.

    Attributes:
        config: what to build; :meth:`create` can be overridden instead.
        n_modules: how many modules it decides on.
        causal: whether its decision depends on earlier tokens only; compared with what the class says.
        balances: whether raising ``balance`` raises the rate of activation.

    Example:
        >>> class TestThreshold(ConfiguratorSuite):               # doctest: +SKIP
        ...     config = Threshold.Config(level=0.7)
        ...     n_modules = 2
    """

    config: ClassVar[Configurator.Config]
    n_modules: ClassVar[int] = 2
    causal = True
    streams = True
    balances: ClassVar[bool] = True
    looks_ahead: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: object) -> None:
        cls.looks_ahead = not cls.causal
        if "streams" not in cls.__dict__:
            cls.streams = cls.causal
        super().__init_subclass__(**kwargs)

    def create(self) -> Configurator:
        """A new configurator."""
        configurator: Configurator = self.config.build(n_modules=self.n_modules)
        return configurator

    def build(self) -> nn.Module:
        members = [nn.Linear(self.d_model, self.d_model) for _ in range(self.n_modules)]
        return SparseMixture(members, self.create(), d_model=self.d_model, causal=self.causal)

    def drawn(self, batch: int = 2, length: int = 6, scale: float = 3.0) -> tuple[Configurator, Tensor, Tensor, Tensor]:
        """A configurator in evaluation mode, logits ``(B, L, M, C)``, positions and ``valid``."""
        torch.manual_seed(0)
        configurator = self.create().double().eval()
        configurator.reset(self.d_model)
        logits = scale * torch.randn(batch, length, self.n_modules, configurator.logits_per_module, dtype=torch.float64)
        position = torch.arange(length).expand(batch, length)
        return configurator, logits, position, torch.ones(batch, length, dtype=torch.bool)

    @law("shapes and dtypes")
    def test_shapes_and_dtypes(self) -> None:
        configurator, logits, position, valid = self.drawn()
        for dtype, least in (
            (torch.bfloat16, torch.float32),
            (torch.float32, torch.float32),
            (torch.float64, torch.float64),
        ):
            score = configurator.to(dtype).score(logits.to(dtype), position)
            active = configurator.decide(score.detach(), position, valid)
            confidence = configurator.weigh(score, active)
            assert score.shape == active.shape == confidence.shape == (2, 6, self.n_modules)
            assert active.dtype == torch.bool
            assert score.dtype == confidence.dtype
            assert torch.finfo(score.dtype).bits >= torch.finfo(least).bits, "decisions are not taken in half precision"

    @law("one meaning")
    def test_a_gate_is_the_three_steps(self) -> None:
        configurator, logits, position, valid = self.drawn()
        torch.nn.init.normal_(configurator.balance)
        gate = gate_of(configurator)
        if gate is None:
            return
        score = configurator.score(logits, position)
        active = configurator.decide(score.detach(), position, valid)
        assert torch.equal(gate.score(logits), score), "the score"
        assert torch.equal(gate.decide(score), active), "the decision"
        assert configurator.weigh(score, active) is score, "the confidence is not the score"

    @law("causality")
    def test_says_whether_it_is_causal(self) -> None:
        assert self.create().causal == self.causal

    @law("causality", when="looks_ahead")
    def test_is_refused_in_a_causal_layer(self) -> None:
        with pytest.raises(ConfigError, match="looks ahead"):
            SparseMixture([nn.Linear(4, 4) for _ in range(self.n_modules)], self.create(), causal=True)

    @law("gradients")
    @few
    @given(scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]))
    def test_finite_at_any_logits(self, scale: float) -> None:
        configurator, logits, position, valid = self.drawn(scale=scale)
        logits.requires_grad_()
        score = configurator.score(logits, position)
        active = configurator.decide(score.detach(), position, valid)
        confidence = configurator.weigh(score, active)
        assert confidence.isfinite().all()
        if confidence.requires_grad and logits.numel():
            (grad,) = torch.autograd.grad(confidence[active].sum() + 0 * confidence.sum(), logits)
            assert grad.isfinite().all()

    @law("gradients")
    def test_the_gradient_comes_through_active_tokens_only(self) -> None:
        layer, x = self.module(), self.inputs(2, 8)
        configurator = layer.configurator
        if not configurator.logits_per_module:
            return self._has_no_router(layer)
        logits = torch.randn(
            2, 8, self.n_modules * configurator.logits_per_module, dtype=torch.float64, requires_grad=True
        )
        _, _, routing, _ = result = layer(x, logits=logits)
        (grad,) = torch.autograd.grad(result.output.square().sum(), logits)
        inactive = ~routing.active.any(-1)
        assert not grad[inactive].any(), "a token that activates nothing has a gradient"
        return None

    def _has_no_router(self, layer: SparseMixture) -> None:
        assert layer.router is None, "a configurator that needs no logits has no router"

    @law("determinism")
    def test_ties(self) -> None:
        configurator, logits, position, valid = self.drawn()
        score = configurator.score(torch.zeros_like(logits), position)
        first = configurator.decide(score, position, valid)
        assert torch.equal(first, configurator.decide(score.clone(), position, valid))
        assert torch.equal(first[0], first[1]), "equal rows of a batch are treated alike"

    @law("balance", when="balances")
    def test_balance_raises_the_rate(self) -> None:
        configurator, logits, position, valid = self.drawn(batch=4, length=50)
        rates = []
        for balance in (-1e3, -1.0, 0.0, 1.0, 1e3):
            configurator.balance.fill_(balance)
            score = configurator.score(logits, position)
            rates.append(float(configurator.decide(score, position, valid).double().mean()))
        assert rates == sorted(rates)
        assert rates[0] == 0
        assert rates[-1] == 1
