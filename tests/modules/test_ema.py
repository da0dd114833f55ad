"""The moving-average mixer: parameters and their initialisation, the mixer contract, streaming."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sma import Mixer, StateHistory
from sma.errors import ConfigError, StreamingError
from sma_modules.mixers.ema import EMA
from sma_modules.ops.ema import EMAState, ema


def build(causal: bool = True, truncation: int | None = None, d_model: int = 6) -> EMA:
    mixer: EMA = EMA.Config(n_state=4, truncation=truncation).build(d_model=d_model, causal=causal)
    return mixer.double()


@pytest.mark.parametrize("causal", [False, True])
def test_parameters(causal: bool) -> None:
    mixer = EMA.Config().build(d_model=200, causal=causal)
    rows = 200 if causal else 400
    shapes = {name: tuple(value.shape) for name, value in mixer.state_dict().items()}
    assert shapes == {
        "delta": (rows, 16, 1),
        "alpha": (rows, 16, 1),
        "beta": (rows, 16, 1),
        "gamma": (rows, 16),
        "omega": (200,),
    }
    assert isinstance(mixer, Mixer)
    assert mixer.streams == causal


def test_initialisation() -> None:
    """Truncated normal at two standard deviations: its standard deviation is 0.880 times that of the normal."""
    mixer = EMA.Config().build(d_model=4000, causal=True)
    signs = torch.tensor([1.0, -1.0]).repeat(8)[:, None]
    for value, std in (
        (mixer.delta, 0.2),
        (mixer.alpha, 0.2),
        (mixer.beta - signs, 0.02),
        (mixer.gamma, 1.0),
        (mixer.omega, 1.0),
    ):
        value = value.detach()
        assert value.abs().max() <= 2 * std + 1e-6
        assert abs(float(value.mean())) < 0.05 * std
        assert abs(float(value.std()) / std - 0.880) < 0.04


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("truncation", [None, 3])
def test_is_the_operation(causal: bool, truncation: int | None) -> None:
    mixer = build(causal, truncation)
    x = torch.randn(2, 11, 6, dtype=torch.float64)
    y, state = mixer(x)
    assert state is None
    weights = (mixer.delta, mixer.alpha, mixer.beta, mixer.gamma, mixer.omega)
    expected, _ = ema(x, *weights, bidirectional=not causal, truncation=truncation)
    torch.testing.assert_close(y, expected)


@given(data=st.data())
def test_streams_in_any_split(data: st.DataObject) -> None:
    truncation = data.draw(st.sampled_from([None, 1, 5, 12]))
    chunks = data.draw(st.lists(st.integers(0, 20), min_size=1, max_size=5))
    mixer = build(True, truncation)
    x = torch.randn(2, sum(chunks), 6, dtype=torch.float64)
    lengths = torch.tensor([sum(chunks), data.draw(st.integers(0, sum(chunks)))])
    whole, _ = mixer(x, lengths=lengths)
    _, last = mixer(x, mixer.initial_state(2, x), lengths=lengths)
    parts: list[Tensor] = []
    state, done = mixer.initial_state(2, x), 0
    for size in chunks:
        y, state = mixer(x[:, done : done + size], state, lengths=(lengths - done).clamp(0, size))
        parts.append(y)
        done += size
    real = torch.arange(sum(chunks)) < lengths[:, None]
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], rtol=0, atol=1e-11)
    assert isinstance(state, EMAState)
    torch.testing.assert_close(state.hidden, last.hidden, rtol=0, atol=1e-11)


def test_state_is_bounded_reordered_and_rolled_back() -> None:
    mixer = build(True, truncation=4).float()
    x = torch.randn(3, 40, 6)
    history: StateHistory[EMAState] = StateHistory(limit=5)
    state, sizes, outputs = mixer.initial_state(3, x), set(), []
    for t in range(40):
        y, state = mixer(x[:, t : t + 1], state)
        sizes.add(state.nbytes)
        history.push(state)
        outputs.append(y)
    assert len(sizes) == 1
    back = history.rollback(3)
    again, _ = mixer(x[:, 37:38], back)
    assert torch.equal(again, outputs[37])
    beams, _ = mixer(x[[2, 2, 0], 37:38], back.reorder(torch.tensor([2, 2, 0])))
    assert torch.equal(beams, outputs[37][[2, 2, 0]])


def test_causal_and_not() -> None:
    x = torch.randn(1, 30, 6, dtype=torch.float64)
    changed = x.clone()
    changed[:, 20:] += 1
    causal, both = build(True), build(False)
    torch.testing.assert_close(causal(x)[0][:, :20], causal(changed)[0][:, :20])
    assert not torch.allclose(both(x)[0][:, :20], both(changed)[0][:, :20])


@pytest.mark.parametrize("causal", [False, True])
def test_batch_independence(causal: bool) -> None:
    mixer = build(causal)
    x = torch.randn(3, 17, 6, dtype=torch.float64)
    lengths = torch.tensor([17, 1, 9])
    together, _ = mixer(x, lengths=lengths)
    for b, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(together[b, :length], mixer(x[b : b + 1, :length])[0][0])


def test_bidirectional_refuses_a_state() -> None:
    x = torch.randn(1, 4, 6, dtype=torch.float64)
    state = build(True).initial_state(x.shape[0], x)
    with pytest.raises(StreamingError, match="bidirectional"):
        build(False)(x, state)
    with pytest.raises(StreamingError, match="looks ahead"):
        build(False).initial_state(1, x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_state": 0}, "n_state: must be at least 1, got 0"),
        ({"truncation": 0}, "truncation: must be None or at least 1, got 0"),
    ],
)
def test_bad_options(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EMA.Config(**options)
