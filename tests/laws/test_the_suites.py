"""The suites find what they are for: each plugin here breaks one law, and the test of that law fails."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sma.configurators import Sigmoid
from sma.interfaces import Mixer, ModuleOutput, Norm
from sma.ops import Op
from sma.ops.backend import _ops
from sma.routing import Packed
from sma.state import State
from sma.testing import ConfiguratorSuite, MixerSuite, ModuleSuite, NormSuite, OpCase, OpSuite
from tests.core.parts import Running, RunningState


class Sound(ModuleSuite):
    """The same module unbroken; the others change one thing each."""

    config = Running.Config()
    causal = True
    streams = True


class MixesRows(Running):
    def forward(self, x: Tensor, packed: Packed, state: RunningState | None = None) -> ModuleOutput:
        return super().forward(x - x.sum(0), packed, state)


class SeesTheFuture(Running):
    def forward(self, x: Tensor, packed: Packed, state: RunningState | None = None) -> ModuleOutput:
        out = super().forward(x, packed, state)
        same = packed.sequence[:, None] == packed.sequence
        return out._replace(output=out.output + 0.1 * same.to(x.dtype) @ x)


class ReadsColumns(Running):
    """Uses the column in the batch, padding included, as the position."""

    def forward(self, x: Tensor, packed: Packed, state: RunningState | None = None) -> ModuleOutput:
        column = packed.index % max(packed.shape[1], 1)
        return super().forward(x * (1 + column[:, None]), packed, state)


class ForgetsItsState(Running):
    def forward(self, x: Tensor, packed: Packed, state: RunningState | None = None) -> ModuleOutput:
        out = super().forward(x, packed, None)
        return out._replace(state=state)


class ChangesItsState(Running):
    def forward(self, x: Tensor, packed: Packed, state: RunningState | None = None) -> ModuleOutput:
        out = super().forward(x, packed, state)
        if state is not None:
            state.total.copy_(out.state.total.detach())
        return out


@dataclass(frozen=True)
class LongState(RunningState):
    seen: tuple[Tensor, ...] = ()


class Remembers(Running):
    def initial_state(self, batch: int, like: Tensor) -> LongState:
        return LongState(super().initial_state(batch, like).total)

    def forward(self, x: Tensor, packed: Packed, state: LongState | None = None) -> ModuleOutput:
        out = super().forward(x, packed, state)
        if state is None:
            return out
        return out._replace(state=LongState(out.state.total, (*state.seen, out.state.total)))


class SkipsNothing(Running):
    """Leaves its parameters out of the graph when nothing is active."""

    def forward(self, x: Tensor, packed: Packed, state: RunningState | None = None) -> ModuleOutput:
        return super().forward(x, packed, state) if len(x) else ModuleOutput(x, state)


class DividesByNothing(Running):
    def forward(self, x: Tensor, packed: Packed, state: RunningState | None = None) -> ModuleOutput:
        out = super().forward(x, packed, state)
        return out._replace(losses={"mean": self.scale.sum() * x.mean()})


class Restless(Running):
    def forward(self, x: Tensor, packed: Packed, state: RunningState | None = None) -> ModuleOutput:
        out = super().forward(x, packed, state)
        return out._replace(output=out.output * (1 + 1e-3 * torch.rand(())))


class CutsAGradient(Running):
    def forward(self, x: Tensor, packed: Packed, state: RunningState | None = None) -> ModuleOutput:
        out = super().forward(x, packed, state)
        return out._replace(output=out.output * self.scale.detach())


class RoundsToFloat32(Running):
    def forward(self, x: Tensor, packed: Packed, state: RunningState | None = None) -> ModuleOutput:
        out = super().forward(x, packed, state)
        return out._replace(output=out.output.float().to(x.dtype))


class AlwaysFloat64(Running):
    def forward(self, x: Tensor, packed: Packed, state: RunningState | None = None) -> ModuleOutput:
        return super().forward(x.double(), packed, state)


class KeepsTooMuch(Running):
    """Draws a parameter outside the state dict."""

    def __init__(self, config: Running.Config, *, d_model: int, causal: bool = False) -> None:
        super().__init__(config, d_model=d_model, causal=causal)
        self.hidden = torch.rand(())

    def forward(self, x: Tensor, packed: Packed, state: RunningState | None = None) -> ModuleOutput:
        return super().forward(x * self.hidden, packed, state)


BROKEN_MODULES = [
    (MixesRows, "test_a_row_is_what_it_is_alone"),
    (MixesRows, "test_gradient_of_batch_mates"),
    (MixesRows, "test_the_definition"),
    (SeesTheFuture, "test_the_past_does_not_depend_on_the_future"),
    (SeesTheFuture, "test_no_gradient_from_the_future"),
    (SeesTheFuture, "test_any_chunks"),
    (ReadsColumns, "test_a_row_is_what_it_is_alone"),
    (ForgetsItsState, "test_any_chunks"),
    (ForgetsItsState, "test_every_cut_in_two_and_single_steps"),
    (ForgetsItsState, "test_a_long_stream_of_steps"),
    (ChangesItsState, "test_forward_does_not_change_its_state"),
    (ChangesItsState, "test_roll_back"),
    (Remembers, "test_size_of_the_state"),
    (SkipsNothing, "test_nothing_active"),
    (SkipsNothing, "test_same_graph_whatever_is_active"),
    (DividesByNothing, "test_nothing_active"),
    (Restless, "test_inference_mode"),
    (Restless, "test_replay_repeats"),
    (CutsAGradient, "test_gradcheck"),
    (RoundsToFloat32, "test_gradcheck"),
    (AlwaysFloat64, "test_bfloat16"),
    (KeepsTooMuch, "test_state_dict"),
]


@pytest.mark.parametrize(("module", "test"), BROKEN_MODULES, ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_module_is_found(module: type[Running], test: str) -> None:
    suite = type("Broken", (Sound,), {"config": module.Config()})
    getattr(Sound(), test)()
    with pytest.raises((AssertionError, RuntimeError)):
        getattr(suite(), test)()


class FollowsTheBatch(Sigmoid):
    def decide(self, score: Tensor, position: Tensor, valid: Tensor) -> Tensor:
        return score > score.mean()


class LooksAhead(Sigmoid):
    """Says that it is causal, and compares with the mean of the sequence."""

    def decide(self, score: Tensor, position: Tensor, valid: Tensor) -> Tensor:
        return score > score.mean(1, keepdim=True)


class Halves(Sigmoid):
    def score(self, logits: Tensor, position: Tensor) -> Tensor:
        return torch.sigmoid(logits[..., 0])


class LeaksThroughInactive(Sigmoid):
    """Lets a gradient through from the token before, active or not."""

    def weigh(self, score: Tensor, active: Tensor) -> Tensor:
        return score + 0.1 * torch.cat([torch.zeros_like(score[:, :1]), score[:, :-1]], 1)


class Explodes(Sigmoid):
    def score(self, logits: Tensor, position: Tensor) -> Tensor:
        e = logits[..., 0].double().exp()
        return e / (1 + e)


class PushesBack(Sigmoid):
    def score(self, logits: Tensor, position: Tensor) -> Tensor:
        return torch.sigmoid((logits[..., 0] - self.balance).float())


BROKEN_CONFIGURATORS = [
    (FollowsTheBatch, "test_a_row_is_what_it_is_alone"),
    (LooksAhead, "test_the_past_does_not_depend_on_the_future"),
    (LooksAhead, "test_any_chunks"),
    (Halves, "test_shapes_and_dtypes"),
    (LeaksThroughInactive, "test_the_gradient_comes_through_active_tokens_only"),
    (Explodes, "test_finite_at_any_logits"),
    (PushesBack, "test_balance_raises_the_rate"),
]


@pytest.mark.parametrize(
    ("configurator", "test"), BROKEN_CONFIGURATORS, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_broken_configurator_is_found(configurator: type[Sigmoid], test: str) -> None:
    sound = type("SoundConfigurator", (ConfiguratorSuite,), {"config": Sigmoid.Config()})
    suite = type("BrokenConfigurator", (ConfiguratorSuite,), {"config": configurator.Config()})
    getattr(sound(), test)()
    with pytest.raises(AssertionError):
        getattr(suite(), test)()


class CountsPadding(Mixer):
    """Subtracts the mean over the row, padding included; bidirectional, and yet it hands out a state."""

    def forward(self, x: Tensor, state: Any = None, *, lengths: Tensor | None = None) -> tuple[Tensor, Any]:
        return x - x.mean(1, keepdim=True) * torch.ones((), dtype=x.dtype), RunningState(x[:, 0])

    def initial_state(self, batch: int, like: Tensor) -> State:
        return RunningState(like.new_zeros(batch, self.d_model))


class CountsPaddingInTraining(Norm):
    def __init__(self, config: Norm.Config, *, d_model: int) -> None:
        super().__init__(config, d_model=d_model)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        return self.scale * (x - x.mean((0, 1)) if self.training else x)


@pytest.mark.parametrize(
    ("suite", "plugin", "test"),
    [
        (MixerSuite, CountsPadding, "test_content_of_the_padding"),
        (MixerSuite, CountsPadding, "test_gradient_of_the_padding"),
        (MixerSuite, CountsPadding, "test_no_state_in_no_state_out"),
        (MixerSuite, CountsPadding, "test_streaming_is_refused"),
        (NormSuite, CountsPaddingInTraining, "test_padding_is_not_counted_in_training"),
    ],
)
def test_a_broken_mixer_or_norm_is_found(suite: type, plugin: Any, test: str) -> None:
    broken = type("Broken", (suite,), {"config": plugin.Config()})
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        getattr(broken(), test)()


@pytest.fixture
def doubling() -> Iterator[Op]:
    op = Op("doubling")
    op.backend("reference", priority=90)(lambda x: x + x)
    yield op
    del _ops["doubling"]


@pytest.mark.parametrize(
    ("backend", "test"),
    [
        (lambda x: 2.0000001 * x, "test_backends_equal_the_reference"),
        (lambda x: x + x.detach(), "test_backends_equal_the_reference"),
        (lambda x: x + x.detach(), "test_gradcheck"),
        (lambda x: x + x * (1 + 1e-3 * torch.rand(())), "test_same_bits_twice"),
        (lambda x: (x + 100) + (x - 100), "test_low_precision"),
        (lambda x: torch._dynamo.graph_break() or x * 2, "test_compiles_in_one_graph"),
    ],
)
def test_a_broken_backend_is_found(doubling: Op, backend: Any, test: str) -> None:
    doubling.backend("eager")(backend)

    class Suite(OpSuite):
        op = doubling

        def cases(self) -> Iterator[OpCase]:
            yield OpCase("five", (torch.randn(5, dtype=torch.float64),))

    with pytest.raises((AssertionError, RuntimeError)):
        getattr(Suite(), test)()


def test_laws_that_do_not_apply_are_left_out() -> None:
    class Bidirectional(ModuleSuite):
        config = Running.Config()

    assert Bidirectional.test_any_chunks is None
    assert Bidirectional.test_the_past_does_not_depend_on_the_future is None
    assert Bidirectional.test_streaming_is_refused is not None
    assert Sound.test_any_chunks is not None
    assert Sound.test_streaming_is_refused is None

    class CausalAfterAll(Bidirectional):
        causal = True

    assert CausalAfterAll.test_the_past_does_not_depend_on_the_future is not None
