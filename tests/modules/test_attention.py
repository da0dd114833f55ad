"""Multi-head attention against PyTorch's, its streams, and the always-on mixer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sma import Packed
from sma.errors import ConfigError, ShapeError, StreamingError
from sma.working_memory import WorkingMemory
from sma_modules.mixers.attention import AttentionMixer
from sma_modules.modules.attention import Attention
from sma_modules.ops.rotary import rotary
from tests.modules.streams import stream

D = 8


def attention(causal: bool = True, **options: Any) -> Attention:
    module: Attention = Attention.Config(**{"n_heads": 2, **options}).build(d_model=D, causal=causal)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.7)
    return module.double()


@pytest.mark.parametrize("causal", [False, True])
def test_equals_pytorch(causal: bool) -> None:
    ours = attention(causal, positions="none")
    theirs = nn.MultiheadAttention(D, 2, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv_proj.weight)
        theirs.in_proj_bias.copy_(ours.qkv_proj.bias)
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    x, lengths = torch.randn(3, 7, D, dtype=torch.float64), torch.tensor([7, 3, 5])
    mask = torch.arange(7) < lengths[:, None]
    future = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
    expected, _ = theirs(x, x, x, key_padding_mask=~mask, attn_mask=future)
    packed = Packed.from_mask(mask)
    torch.testing.assert_close(ours(x[mask], packed).output, expected[mask], rtol=0, atol=1e-12)


def test_grouped_keys_are_repeated_keys() -> None:
    few = attention(n_heads=4, n_kv_heads=2, window=3)
    many = attention(n_heads=4, window=3)
    rows = torch.cat(
        [
            torch.arange(8),
            *(8 + part * 4 + torch.arange(4).view(2, 2).repeat_interleave(2, 0).flatten() for part in range(2)),
        ]
    )
    many.load_state_dict(
        {**few.state_dict(), "qkv_proj.weight": few.qkv_proj.weight[rows], "qkv_proj.bias": few.qkv_proj.bias[rows]}
    )
    mask = torch.rand(2, 9) < 0.8
    x, packed = torch.randn(int(mask.sum()), D, dtype=torch.float64), Packed.from_mask(mask)
    out, state, _ = few(x, packed, few.initial_state(2, x))
    torch.testing.assert_close(out, many(x, packed).output, rtol=0, atol=1e-12)
    assert isinstance(state, WorkingMemory)
    assert state.rows[0].shape == (2, 3, 2, 2)


@pytest.mark.parametrize("options", [{"window": 3}, {"window": 2, "chunk": 4, "n_kv_heads": 1}, {"chunk": 3}], ids=str)
@settings(max_examples=12)
@given(data=st.data())
def test_parallel_is_chunked_is_step_by_step(options: dict[str, Any], data: st.DataObject) -> None:
    module = attention(**options)
    length = data.draw(st.integers(1, 12))
    mask = torch.rand(2, length) < data.draw(st.sampled_from([0.4, 1.0]))
    x = torch.randn(int(mask.sum()), D, dtype=torch.float64)
    whole = module(x, Packed.from_mask(mask)).output
    for cuts in (data.draw(st.lists(st.integers(0, length), max_size=3)), list(range(1, length))):
        y, _ = stream(module, x, mask, cuts)
        torch.testing.assert_close(y, whole, rtol=0, atol=1e-11)


def test_nothing_active_keeps_the_graph() -> None:
    module = attention()
    out = module(torch.zeros(0, D, dtype=torch.float64), Packed.from_mask(torch.zeros(2, 3, dtype=torch.bool))).output
    for grad in torch.autograd.grad(out.sum(), list(module.parameters())):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_unbounded_does_not_stream() -> None:
    module = attention()
    x, packed = torch.zeros(2, D, dtype=torch.float64), Packed.from_mask(torch.ones(1, 2, dtype=torch.bool))
    assert not module.streams
    assert module(x, packed).state is None
    with pytest.raises(StreamingError, match="Attention: only causal modules"):
        module(x, packed, attention(window=2).initial_state(1, x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_heads": 3}, r"n_heads: must divide d_model \(8\), got 3"),
        ({"n_heads": 8}, "n_heads: must leave an even width per head"),
        ({"n_heads": 0}, "n_heads: must be at least 1, got 0"),
        ({"n_heads": 4, "n_kv_heads": 3}, r"n_kv_heads: must divide n_heads \(4\), got 3"),
        ({"positions": "local"}, "positions: must be one of none, rotary, got 'local'"),
        ({"window": 0}, "window: must be at least 1 or null, got 0"),
    ],
)
@pytest.mark.parametrize("kind", [Attention, AttentionMixer])
def test_bad_options_are_refused(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind.Config(**options).build(d_model=8)


def mixer(causal: bool = True, **options: Any) -> AttentionMixer:
    module: AttentionMixer = AttentionMixer.Config(n_heads=2, **options).build(d_model=D, causal=causal)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.7)
    return module.double()


@settings(max_examples=15)
@given(data=st.data())
def test_mixer_streams_with_ragged_chunks(data: st.DataObject) -> None:
    """Rows of a chunk have different numbers of real tokens, zero included; each goes on where it was."""
    module = mixer(window=3)
    x = torch.randn(2, 10, D, dtype=torch.float64)
    whole, _ = module(x)
    state, done = module.initial_state(2, x), torch.zeros(2, dtype=torch.int64)
    while bool((done < 10).any()):
        lengths = torch.tensor([data.draw(st.integers(0, min(4, 10 - int(n)))) for n in done])
        if not lengths.any():
            lengths = (10 - done).clamp(max=1)
        chunk = torch.full((2, 4, D), 9.0, dtype=torch.float64)
        for b in range(2):
            chunk[b, : lengths[b]] = x[b, done[b] : done[b] + lengths[b]]
        y, state = module(chunk, state, lengths=lengths)
        for b in range(2):
            torch.testing.assert_close(y[b, : lengths[b]], whole[b, done[b] : done[b] + lengths[b]], rtol=0, atol=1e-11)
            assert not y[b, lengths[b] :].any()
        done = done + lengths


@pytest.mark.parametrize("causal", [False, True])
def test_mixer_ignores_padding(causal: bool) -> None:
    module = mixer(causal)
    x, lengths = torch.randn(2, 6, D, dtype=torch.float64), torch.tensor([6, 2])
    y, state = module(x, lengths=lengths)
    assert state is None
    x[1, 2:] = float("nan")
    again, _ = module(x, lengths=lengths)
    assert torch.equal(again, y)
    torch.testing.assert_close(y[1:, :2], module(x[1:, :2])[0], rtol=0, atol=1e-12)


def test_mixer_refuses_what_does_not_fit() -> None:
    module = mixer(window=2)
    x = torch.zeros(2, 3, D, dtype=torch.float64)
    with pytest.raises(ShapeError, match=r"AttentionMixer: x must be \(B, L, 8\), got \(2, 3, 7\)"):
        module(x[..., 1:])
    with pytest.raises(StreamingError, match="holds 3 sequences"):
        module(x, module.initial_state(3, x))


def test_rotary_depends_on_distances_only() -> None:
    q, k = torch.randn(2, 1, 1, 6, dtype=torch.float64)
    products = [(rotary(q, torch.tensor([t + 5])) * rotary(k, torch.tensor([t]))).sum() for t in (0, 1, 1000, 10**9)]
    for product in products:
        torch.testing.assert_close(product, products[0], rtol=0, atol=1e-6)
    far = (rotary(q, torch.tensor([6])) * rotary(k, torch.tensor([0]))).sum()
    assert abs(float(far - products[0])) > 1e-3


def test_rotary_turns_adjacent_pairs() -> None:
    x = torch.tensor([[[1.0, 0.0, 1.0, 0.0]]], dtype=torch.float64)
    y = rotary(x, torch.tensor([3]), theta=100.0).flatten()
    angles = torch.tensor([3.0, 0.3], dtype=torch.float64)
    torch.testing.assert_close(y, torch.stack([angles.cos(), angles.sin()], -1).flatten())
    assert torch.autograd.gradcheck(lambda t: rotary(t, torch.tensor([3])), x.requires_grad_())


def test_rotary_refuses_odd_widths_and_missing_positions() -> None:
    with pytest.raises(ShapeError, match="even z"):
        rotary(torch.zeros(1, 1, 3), torch.tensor([0]))
    with pytest.raises(ShapeError, match=r"position must be \(1,\)"):
        rotary(torch.zeros(1, 1, 2), torch.tensor([0, 1]))
