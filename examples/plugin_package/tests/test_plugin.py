"""The package is found by its entry point, does what it says, and a model made of it learns."""

from __future__ import annotations

import pytest
import torch
from sma_example_plugin import ShortConv, SinkSigmoid
from torch.nn import functional as F

import sma
from sma.errors import ConfigError, ShapeError, SpecError, StreamingError


def test_the_three_parts_are_registered_by_the_installed_package() -> None:
    registry = sma.plugins.registry()
    assert registry.get("module", "short_conv") is ShortConv
    assert registry.get("configurator", "sink_sigmoid") is SinkSigmoid
    entry = registry.entry("spec", "short_conv_lm")
    assert str(entry.provider) == "sma-example-plugin 0.1.0 (sma_example_plugin.plugin)"
    assert [each for each in registry.failures() if each.provider.distribution == "sma-example-plugin"] == []


def test_a_model_made_of_all_three_learns() -> None:
    torch.manual_seed(0)
    model = sma.build("short_conv_lm")
    text = torch.tensor(list(b"to be or not to be, that is the question. " * 3))[None]
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        out = model(text[:, :-1])
        loss = F.cross_entropy(out.logits[0], text[0, 1:]) + sum(out.losses.values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    router = model.get_parameter("stack.layers.0.sublayers.1.activate.router.weight")
    assert router.grad is not None
    assert float(router.grad.abs().sum()) > 0, "the configurator learns"


def test_sinks_are_always_active() -> None:
    model = sma.build("short_conv_lm").eval()
    for routing in model(torch.randint(0, 256, (2, 20))).routings.values():
        assert bool(routing.active[:, :4].all())
    configurator = SinkSigmoid.Config(n_sinks=1).build()
    logits = torch.tensor([-1.0, -1.0, 1.0]).view(1, 3, 1, 1)
    position = torch.arange(3)[None]
    score = configurator.score(logits, position)
    active = configurator.decide(score, position, torch.ones(1, 3, dtype=torch.bool))
    assert active.flatten().tolist() == [True, False, True]
    assert torch.allclose(score.flatten(), torch.sigmoid(logits).flatten())


def test_the_convolution_is_that_of_torch() -> None:
    torch.manual_seed(0)
    conv = ShortConv.Config(kernel=3).build(d_model=4).double()
    mask = torch.tensor([[True, False, True, True, False, True], [False] * 6, [False, True, True, False, False, False]])
    packed = sma.Packed.from_mask(mask)
    x = torch.randn(6, 4, dtype=torch.float64)
    expected = []
    for row in x.split([4, 2]):  # the sequence in between activates nothing
        padded = F.pad(row.T[None], (2, 0))
        mixed = F.conv1d(padded, conv.weight.flip(0).T[:, None], conv.bias, groups=4)[0].T
        expected.append(conv.out(F.silu(mixed)))
    assert torch.allclose(conv(x, packed).output, torch.cat(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", [1, 2, 5])
def test_chunks_of_any_length_continue(kernel: int) -> None:
    torch.manual_seed(0)
    conv = ShortConv.Config(kernel=kernel).build(d_model=4, causal=True).double()
    x = torch.randn(2, 7, 4, dtype=torch.float64)
    every = torch.ones(2, 7, dtype=torch.bool)
    whole = conv(x.flatten(0, 1), sma.Packed.from_mask(every)).output.view(2, 7, 4)
    state = None
    parts = []
    for chunk in x.split([1, 0, 2, 4], dim=1):
        out = conv(chunk.flatten(0, 1), sma.Packed.from_mask(every[:, : chunk.shape[1]]), state)
        state = out.state
        parts.append(out.output.view(2, -1, 4))
    assert torch.allclose(torch.cat(parts, 1), whole, rtol=0, atol=1e-12)
    assert state.tokens.shape == (2, kernel - 1, 4)


def test_bad_input() -> None:
    conv = ShortConv.Config(kernel=3).build(d_model=4)
    packed = sma.Packed.from_mask(torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ShapeError, match=r"ShortConv: x must be \(2, 4\), got \(3, 4\)"):
        conv(torch.zeros(3, 4), packed)
    with pytest.raises(StreamingError, match="ShortConv: a state for a batch of 1 is needed"):
        conv(torch.zeros(2, 4), packed, conv.initial_state(2, torch.zeros(1)))
    with pytest.raises(ConfigError, match="kernel: must be at least 1, got 0"):
        ShortConv.Config(kernel=0)
    with pytest.raises(SpecError, match=r"module \(short_conv\): unknown key 'kernal'; did you mean 'kernel'\?"):
        sma.build("short_conv_lm", "blocks[0].sublayers[1].activate.module.kernal=3")
