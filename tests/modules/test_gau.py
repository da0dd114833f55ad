"""The gated attention unit: its equations, and the laws of streams and sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sma import Packed
from sma.errors import ConfigError, ShapeError, StreamingError
from sma.working_memory import WorkingMemory
from sma_modules.modules.attention import Attention
from sma_modules.modules.gau import GAU
from tests.modules.streams import stream

D = 6
OPTIONS: list[dict[str, Any]] = [
    {"positions": "rotary", "window": 4},
    {"positions": "simple", "window": 3, "max_positions": 7, "activation": "relu2"},
    {"positions": "local", "window": 2, "activation": "laplace"},
    {"positions": "none", "window": None, "chunk": 3, "activation": "relu2"},
    {"positions": "rotary", "window": 2, "chunk": 4},
    {"positions": "simple", "window": None, "chunk": 1, "max_positions": 3},
]


def unit(causal: bool = True, **options: Any) -> GAU:
    """A unit in float64 whose weights are large enough to matter."""
    gau: GAU = GAU.Config(**{"d_qk": 4, "d_v": 5, **options}).build(d_model=D, causal=causal)
    for parameter in gau.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return gau.double()


def tokens(mask: Tensor) -> Tensor:
    return torch.randn(int(mask.sum()), D, dtype=torch.float64)


def test_equations() -> None:
    """Against the equations with dense matrices, one sequence, causal window 2, table of original positions."""
    gau = unit(positions="simple", window=2, max_positions=4)
    mask = torch.tensor([[True, False, True, True, False, False, False, True, True]])
    x, t = tokens(mask), mask[0].nonzero()[:, 0]
    m = F.silu(x @ gau.mx_proj.weight.T + gau.mx_proj.bias)
    z, r, v = m[:, :4], m[:, 4:9], m[:, 9:]
    q, k = z * gau.gamma[0] + gau.beta[0], z * gau.gamma[1] + gau.beta[1]
    assert gau.position_bias is not None
    scores = q @ k.T / 2 + gau.position_bias[3 + (t - t[:, None]).clamp(-3, 3)]
    distance = torch.arange(5)[:, None] - torch.arange(5)
    scores = scores.masked_fill((distance < 0) | (distance > 2), -torch.inf)
    expected = ((scores.softmax(-1) @ v) * r) @ gau.h_proj.weight.T + gau.h_proj.bias
    torch.testing.assert_close(gau(x, Packed.from_mask(mask)).output, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@settings(max_examples=12)
@given(data=st.data())
def test_parallel_is_chunked_is_step_by_step(options: dict[str, Any], data: st.DataObject) -> None:
    gau = unit(**options)
    length = data.draw(st.integers(1, 14))
    mask = torch.rand(3, length) < data.draw(st.sampled_from([0.3, 0.8, 1.0]))
    x = tokens(mask)
    whole, _, _ = gau(x, Packed.from_mask(mask))
    cuts = data.draw(st.lists(st.integers(0, length), max_size=3))
    for some in (cuts, list(range(1, length))):
        y, state = stream(gau, x, mask, some)
        torch.testing.assert_close(y, whole, rtol=0, atol=1e-11)
        assert isinstance(state, WorkingMemory)
        assert state.count.tolist() == mask.sum(1).tolist()


def test_every_split_of_a_short_stream() -> None:
    gau = unit(window=2)
    mask = torch.tensor([[True, True, False, True, True, True], [False, True, True, False, False, True]])
    x = tokens(mask)
    whole = gau(x, Packed.from_mask(mask)).output
    for first in range(7):
        for second in range(first, 7):
            y, _ = stream(gau, x, mask, [first, second])
            torch.testing.assert_close(y, whole, rtol=0, atol=1e-12)


def test_gradients_of_a_stream_are_those_of_the_whole() -> None:
    gau = unit(positions="simple", window=3, max_positions=5)
    mask = torch.rand(2, 9) < 0.7
    x = tokens(mask).requires_grad_()
    inputs = [x, *gau.parameters()]
    whole = torch.autograd.grad(gau(x, Packed.from_mask(mask)).output.square().sum(), inputs)
    parts = torch.autograd.grad(stream(gau, x, mask, [2, 3, 7])[0].square().sum(), inputs)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_sequence_is_its_own_world(options: dict[str, Any], causal: bool) -> None:
    gau = unit(causal, **options)
    mask = torch.rand(4, 50) < torch.tensor([[0.0], [0.3], [0.9], [1.0]])
    x, packed = tokens(mask), Packed.from_mask(mask)
    y = gau(x, packed).output
    for b in range(4):
        own = packed.sequence == b
        alone = gau(x[own], Packed.from_mask(mask[b : b + 1])).output
        torch.testing.assert_close(y[own], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nothing_active(options: dict[str, Any], causal: bool) -> None:
    """Zero rows out, and zero gradients for every parameter, not none."""
    gau = unit(causal, **options)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    x = tokens(mask).requires_grad_()
    out, state, _ = gau(x, Packed.from_mask(mask), gau.initial_state(2, x))
    assert out.shape == (0, D)
    for grad in torch.autograd.grad(out.sum(), [x, *gau.parameters()]):
        assert torch.equal(grad, torch.zeros_like(grad))
    assert (state is not None) == causal


def test_nothing_active_leaves_the_memory_as_it_is() -> None:
    gau = unit(window=3)
    mask = torch.ones(2, 5, dtype=torch.bool)
    x = tokens(mask)
    _, state, _ = gau(x, Packed.from_mask(mask), gau.initial_state(mask.shape[0], x))
    _, after, _ = gau(torch.zeros(0, D, dtype=torch.float64), Packed.from_mask(~mask), state)
    assert all(torch.equal(a, b) for a, b in zip(state.tensors(), after.tensors(), strict=True))


def test_state_is_bounded() -> None:
    gau = unit(window=4)
    state = gau.initial_state(2, torch.zeros(1, dtype=torch.float64))
    assert state is not None
    size = state.nbytes
    mask = torch.ones(2, 40, dtype=torch.bool)
    _, state = stream(gau, tokens(mask), mask, list(range(1, 40)), state)
    assert state.nbytes == size
    assert size == 2 * (4 * (4 + 5 + 1) + 1) * 8


def test_reordered_states_go_on_like_their_sequences() -> None:
    gau = unit(window=3)
    mask = torch.ones(2, 6, dtype=torch.bool)
    x = tokens(mask).view(2, 6, D)
    first, last = Packed.from_mask(mask[:, :5]), Packed.from_mask(mask[:, 5:], torch.full((2, 1), 5))
    _, state, _ = gau(x[:, :5].reshape(-1, D), first, gau.initial_state(2, x))
    straight = gau(x[:, 5], last, state).output
    swapped = gau(x[:, 5].flip(0), last, state.reorder(torch.tensor([1, 0]))).output
    torch.testing.assert_close(swapped.flip(0), straight, rtol=0, atol=1e-12)


def test_causal_and_not() -> None:
    mask = torch.ones(1, 8, dtype=torch.bool)
    x = tokens(mask).requires_grad_()
    for causal in (False, True):
        (grad,) = torch.autograd.grad(unit(causal, window=3)(x, Packed.from_mask(mask)).output[4].sum(), x)
        seen = [i for i in range(8) if grad[i].abs().sum() > 0]
        assert seen == ([1, 2, 3, 4] if causal else [1, 2, 3, 4, 5, 6, 7])


def test_what_cannot_stream_says_so() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    x, packed = tokens(mask), Packed.from_mask(mask)
    memory = unit(window=3).initial_state(1, x)
    for causal, options in ((False, {"window": 3}), (True, {"window": None})):
        gau = unit(causal, **options)
        assert not gau.streams
        assert gau.initial_state(1, x) is None
        assert gau(x, packed).state is None
        with pytest.raises(StreamingError, match="only causal modules with a window or a chunk take a state"):
            gau(x, packed, memory)
    with pytest.raises(StreamingError, match="needs a WorkingMemory of 2 tokens, got one of 3"):
        unit(window=2)(x, packed, memory)
    other = Attention.Config(window=3, n_heads=1).build(d_model=D, causal=True).initial_state(1, x)
    with pytest.raises(StreamingError, match="remembers rows of shapes"):
        unit(window=3)(x, packed, other)


def test_tokens_of_the_wrong_shape_are_refused() -> None:
    packed = Packed.from_mask(torch.ones(1, 3, dtype=torch.bool))
    for shape in ((3, D + 1), (2, D), (1, 3, D)):
        with pytest.raises(ShapeError, match=r"GAU: tokens must be \(3, 6\)"):
            unit()(torch.zeros(shape, dtype=torch.float64), packed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_qk": 0}, "d_qk: must be at least 1, got 0"),
        ({"d_v": 0}, "d_v: must be at least 1 or null, got 0"),
        ({"window": 0}, "window: must be at least 1 or null, got 0"),
        ({"chunk": 0}, "chunk: must be at least 1 or null, got 0"),
        ({"d_qk": 5}, "d_qk: must be even for positions 'rotary', got 5"),
        ({"positions": "local", "window": None}, "window: must be given for positions 'local', got None"),
        ({"positions": "far"}, "positions: must be one of .* got 'far'"),
        ({"activation": "gelu"}, "activation: must be one of .* got 'gelu'"),
        ({"max_positions": 0}, "max_positions: must be at least 1, got 0"),
        ({"attention_dropout": 1.0}, "attention_dropout: must be in"),
        ({"hidden_dropout": -0.1}, "hidden_dropout: must be in"),
        ({"rotary_theta": 0.0}, "rotary_theta: must be positive, got 0.0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GAU.Config(**options)


def test_widths_and_initial_values() -> None:
    gau = GAU.Config(positions="simple", max_positions=500).build(d_model=32)
    assert gau.mx_proj.weight.shape == (64 + 4 * 32, 32)
    assert gau.position_bias.shape == (999,)
    assert GAU.Config(positions="local", window=5).build(d_model=8).position_bias.shape == (29,)
    assert gau.attention_window() == 128
    for weight in (gau.mx_proj.weight, gau.h_proj.weight, gau.gamma):
        assert 0.012 < float(weight.detach().std()) < 0.02
        assert float(weight.detach().abs().max()) <= 0.04
    assert 0.018 < float(gau.position_bias.detach().std()) < 0.022
    assert not any(bias.detach().any() for bias in (gau.mx_proj.bias, gau.h_proj.bias, gau.beta))


def test_dropout_in_training_only() -> None:
    gau = unit(hidden_dropout=0.5, attention_dropout=0.5)
    mask = torch.ones(1, 30, dtype=torch.bool)
    x, packed = tokens(mask), Packed.from_mask(mask)
    assert 0.3 < float((gau(x, packed).output == 0).double().mean()) < 0.7
    gau.eval()
    assert torch.equal(gau(x, packed).output, gau(x, packed).output)
    assert not (gau(x, packed).output == 0).any()
