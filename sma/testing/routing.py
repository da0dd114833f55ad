"""Laws 5 and 6: nothing active, and a routing that is decided once."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sma.interfaces import Configurator
from sma.runtime.checkpointing import checkpoint
from sma.testing.base import SequenceSuite, everything, few, gradients, law, leaves, nothing, with_decision


class RoutingLaws(SequenceSuite):
    """Decisions can be recorded, replayed and emptied, and are never taken twice."""

    def check_silent(self, y: Tensor, valid: Tensor) -> None:
        """What the output has to be when no module is active; a single layer gives zeros."""

    @law("nothing active", when="routes")
    def test_nothing_active(self) -> None:
        module = self.module()
        x, valid = self.pad(self.rows([5, 0, 3]), self.sides[-1])
        usual = self.call(module, x, valid=valid)
        silent = self.call(module, x, valid=valid, replay=with_decision(usual.routings, nothing))
        assert all(not routing.active.any() for routing in silent.routings.values())
        assert silent.y.isfinite().all()
        self.check_silent(silent.y, valid)
        for name, grad in gradients(silent.total(), module).items():
            assert grad is not None, f"{name} has no gradient when nothing is active"
            assert grad.isfinite().all(), f"{name} has a gradient that is not finite when nothing is active"

    @law("nothing active", when="routes")
    def test_same_graph_whatever_is_active(self) -> None:
        module, x = self.module(), self.inputs(2, 6)
        usual = self.call(module, x)
        full = self.call(module, x, replay=with_decision(usual.routings, everything))
        silent = self.call(module, x, replay=with_decision(usual.routings, nothing))
        assert leaves(full.total()) == leaves(usual.total()) == leaves(silent.total())
        assert leaves(silent.total()) >= {id(parameter) for parameter in module.parameters()}

    @law("nothing active")
    def test_empty_sequences(self) -> None:
        if self.shortest:
            return self._all_padding(1)
        y = self.call(self.module(), self.inputs(2, 0)).y
        assert y.shape[:2] == (2, 0) if self.per_token else y.isfinite().all()
        return self._all_padding(3)

    def _all_padding(self, length: int) -> None:
        module = self.module()
        x = self.garbage(self.inputs(2, length))
        result = self.call(module, x, valid=torch.zeros(2, length, dtype=torch.bool))
        assert result.y.isfinite().all()
        assert all(not routing.active.any() for routing in result.routings.values()), "padding was activated"

    @law("record and replay", when="routes")
    def test_replay_repeats(self) -> None:
        module, rows = self.module(), self.rows([6, 3, 5])
        x, valid = self.pad(rows, self.sides[-1])
        first = self.call(module, x, valid=valid)
        record = {name: routing.detach() for name, routing in first.routings.items()}
        again = self.call(module, x, valid=valid, replay=record)
        self.assert_close(again.y, first.y, "replayed")
        assert all(torch.equal(again.routings[name].active, routing.active) for name, routing in record.items())

    @law("record and replay", when="routes")
    @few
    @given(seed=st.integers(0, 1000))
    def test_replay_obeys(self, seed: int) -> None:
        module, x = self.module(), self.inputs(2, 6)
        torch.manual_seed(seed)
        usual = self.call(module, x).routings
        other = with_decision(usual, lambda routing: torch.rand(routing.active.shape) < 0.5)
        result = self.call(module, x, replay=other)
        for name, routing in other.items():
            assert torch.equal(result.routings[name].active, routing.active)
        assert result.y.isfinite().all()

    @law("routing saved under checkpointing")
    def test_checkpointing(self) -> None:
        module = self.module().train()
        deciding = [part for part in module.modules() if isinstance(part, Configurator) and not part.everywhere]
        flaky = [_Flaky(part) for part in deciding]
        x, valid = self.pad(self.rows([6, 3, 5]), self.sides[-1])
        torch.manual_seed(7)
        # Whole rows only: nothing may depend on what lies at padding.
        result = checkpoint(self.call, module, x, valid=valid)
        y = result.y[valid] if self.per_token else result.y
        recomputed = gradients(y.square().sum(), module)
        assert all(each.calls > 1 for each in flaky), "nothing was computed anew: the test shows nothing"
        torch.manual_seed(7)
        replay = {name: routing.detach() for name, routing in result.routings.items()}
        plain = self.call(module, x, valid=valid, replay=replay or None)
        expected = gradients((plain.y[valid] if self.per_token else plain.y).square().sum(), module)
        for name, grad in expected.items():
            if grad is not None:
                other = recomputed[name]
                assert other is not None, f"{name} has no gradient under checkpointing"
                self.assert_close(other, grad, f"gradient of {name} under checkpointing")


class _Flaky:
    """Makes a configurator decide differently at every call; the other random numbers stay as they were."""

    def __init__(self, configurator: nn.Module) -> None:
        self.calls = 0
        self.generator = torch.Generator().manual_seed(0)
        configurator.decide = self.decide  # type: ignore[assignment]

    def decide(self, score: Tensor, *args: Any) -> Tensor:
        self.calls += 1
        return torch.rand(score.shape, generator=self.generator) < 0.5
