"""What makes a part one that has to be called, and what notices that it became one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations

from sma.configurators import Sigmoid
from sma.dropout import Dropout
from sma.errors import ConfigError
from sma.interfaces import Configurator, Mixer, Norm
from sma.layer import SparselyActivated
from sma.runtime.plain import DROPOUTS, PartsWatch, is_plain, unwrapped, watched_parts, why_called
from sma_modules.mixers.ema import EMA
from sma_modules.norms import LayerNorm


class Shouting(nn.Linear):
    """A replaced projection."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Wrapped(Tensor):
    """A subclass of tensors, as sharded and quantised weights are."""


def nothing(*_: object) -> None:
    return None


def replaced_weight(linear: nn.Linear) -> None:
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Wrapped))


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "forward hook": (lambda part: part.register_forward_hook(nothing), "has hooks"),
    "forward pre-hook": (lambda part: part.register_forward_pre_hook(nothing), "has hooks"),
    "backward hook": (lambda part: part.register_full_backward_hook(nothing), "has hooks"),
    "backward pre-hook": (lambda part: part.register_full_backward_pre_hook(nothing), "has hooks"),
    "old weight norm": (torch.nn.utils.weight_norm, "has hooks"),
    "old spectral norm": (torch.nn.utils.spectral_norm, "has hooks"),
    "pruning": (lambda part: torch.nn.utils.prune.random_unstructured(part, "weight", 0.5), "has hooks"),
    "weight norm": (parametrizations.weight_norm, "is of class ParametrizedLinear, not Linear"),
    "spectral norm": (parametrizations.spectral_norm, "is of class ParametrizedLinear, not Linear"),
    "own forward": (lambda part: setattr(part, "forward", part.forward), "has a forward of its own"),
    "compiled in place": (lambda part: part.compile(backend="eager"), "is compiled"),
    "tensor subclass": (replaced_weight, "has a weight that is a Wrapped"),
}
old_ways = pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")


@old_ways
@pytest.mark.parametrize("change", CHANGES)
def test_a_projection(change: str) -> None:
    parent = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    watch = PartsWatch(parent)
    part = parent[0]
    assert is_plain(part)
    assert why_called(part) is None
    assert not watch.changed()
    apply, reason = CHANGES[change]
    apply(part)
    assert not is_plain(part)
    assert why_called(part) == reason
    assert watch.changed()
    assert watch.changed(), "it says so until there is another watch"
    assert not PartsWatch(parent).changed()


def test_what_is_not_the_class_itself() -> None:
    assert not is_plain(Shouting(2, 2))
    assert why_called(Shouting(2, 2)) == "is of class Shouting, not Linear"
    assert not is_plain(nn.Identity())
    assert is_plain(nn.Dropout(), DROPOUTS)
    assert is_plain(Dropout(), DROPOUTS)
    assert not is_plain(nn.AlphaDropout(), DROPOUTS)
    assert why_called(nn.Identity(), Mixer) == "is of class Identity, not Mixer"


@pytest.mark.parametrize("wrap", [lambda part: torch.compile(part, backend="eager"), checkpoint_wrapper])
def test_wrappers(wrap: Callable[[nn.Module], Any]) -> None:
    mixer = EMA.Config().build(d_model=4)
    assert is_plain(mixer, Mixer)
    wrapped = wrap(mixer)
    assert not is_plain(wrapped, Mixer)
    assert unwrapped(checkpoint_wrapper(wrapped)) is mixer
    parent = nn.ModuleDict({"mixer": mixer})
    watch = PartsWatch(parent)
    parent["mixer"] = wrapped
    assert watch.changed()


def test_global_hooks() -> None:
    linear, mixer = nn.Linear(2, 2), EMA.Config().build(d_model=4)
    watch = PartsWatch(linear)
    with register_module_forward_hook(nothing):
        assert not is_plain(linear)
        assert not is_plain(mixer, Mixer)
        assert why_called(mixer, Mixer) == "is watched by global module hooks"
        assert watched_parts(mixer) == {"": "is watched by global module hooks"}
        assert watch.changed()
    assert is_plain(linear)


def test_hooks_elsewhere_change_nothing() -> None:
    linear, other = nn.Linear(2, 2), nn.Linear(2, 2)
    watch = PartsWatch(linear)
    other.register_forward_hook(nothing)
    torch.ones(1, requires_grad=True).register_hook(nothing)
    with torch.no_grad():
        linear.weight.add_(1)
    assert not watch.changed()


def test_who_is_watched() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    assert watched_parts(model) == {}
    model[1][0].register_forward_pre_hook(nothing)
    model[0].forward = nn.Identity().forward
    assert watched_parts(model) == {"0": "has a forward of its own", "1.0": "has hooks"}


def test_it_is_traced() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.dropout, self.mixer = nn.Linear(2, 2), nn.Dropout(0.1), EMA.Config().build(d_model=2)

        def forward(self, x: Tensor) -> Tensor:
            plain = is_plain(self.linear) and is_plain(self.dropout, DROPOUTS) and is_plain(self.mixer, Mixer)
            return x @ self.linear.weight.t() if plain else self.linear(x)

    for watched in (False, True):
        module = Asks()
        if watched:
            module.linear.register_forward_hook(lambda module, args, out: out + 1)
        x = torch.randn(3, 2)
        torch.compiler.reset()  # a graph has no guard on hooks
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), module(x))
        torch.testing.assert_close(torch.export.export(module, (x,)).module()(x), module(x))


class Doubled(LayerNorm):
    def forward(self, x: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        return 2 * super().forward(x, lengths=lengths)


class Loud(EMA):
    def forward(self, x: Tensor, state: Any = None, *, lengths: Tensor | None = None) -> tuple[Tensor, Any]:
        y, after = super().forward(x, state, lengths=lengths)
        return 2 * y, after


def test_a_new_forward_replaces_what_stood_in_for_the_old_one() -> None:
    norm, mixer = Doubled.Config().build(d_model=4), Loud.Config().build(d_model=4, causal=True)
    x = torch.randn(2, 3, 4)
    assert norm.row_norm() is None
    assert Doubled.row_norm is Norm.row_norm
    assert Loud.stepper is Mixer.stepper
    torch.testing.assert_close(mixer.activated(x)[0], nn.functional.silu(mixer(x)[0]))
    assert LayerNorm.row_norm is not Norm.row_norm


def test_a_configurator_is_called_where_it_is_not_plain() -> None:
    layer = SparselyActivated(nn.Linear(4, 4), Sigmoid(Sigmoid.Config()))
    seen: list[Tensor] = []
    layer.configurator.register_forward_hook(lambda module, args, score: seen.append(score))
    assert not is_plain(layer.configurator, Configurator)
    routing = layer(torch.randn(2, 3, 4)).routing
    torch.testing.assert_close(seen[0], routing.confidence)


@pytest.mark.parametrize("wrap", [lambda chain: chain.register_forward_hook(nothing) and chain, checkpoint_wrapper])
def test_a_chain_that_is_run_part_by_part_must_be_plain(wrap: Callable[[nn.Module], nn.Module]) -> None:
    layer = SparselyActivated(nn.Sequential(nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 4)))
    layer.module = wrap(layer.module)
    with pytest.raises(ConfigError, match="Sequential: layout 'padded' runs it part by part, so it must be plain, but"):
        layer(torch.randn(2, 3, 4))
