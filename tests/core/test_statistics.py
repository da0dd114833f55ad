"""Activation rate, attention span against brute force, operations against a count by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sma.configurators import Always, FixedRate
from sma.layer import SparselyActivated
from sma.routing import Packed, Routing
from sma.statistics import activation_rate, all_active, attention_span, count_flops, operations


@given(
    seed=st.integers(0, 10_000),
    shape=st.tuples(st.integers(1, 3), st.integers(0, 12)),
    window=st.one_of(st.none(), st.integers(1, 5)),
    causal=st.booleans(),
)
def test_attention_span_against_brute_force(
    seed: int, shape: tuple[int, int], window: int | None, causal: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < 0.5
    position = torch.rand(shape, generator=generator).mul(5).long().add(1).cumsum(1)
    spans = attention_span(Packed.from_mask(mask, position), window, causal=causal)
    for b in range(shape[0]):
        at = position[b, mask[b]].tolist()
        means = []
        for i, here in enumerate(at):
            seen = [
                abs(here - there)
                for j, there in enumerate(at)
                if j != i and (window is None or abs(i - j) <= window) and (j < i or not causal)
            ]
            means.append(sum(seen) / len(seen) if seen else 0.0)
        assert spans[b].item() == pytest.approx(sum(means) / len(means) if means else 0.0)


def test_two_far_tokens_are_neighbours_in_memory() -> None:
    mask = torch.zeros(1, 1000, dtype=torch.bool)
    mask[0, [0, 999]] = True
    assert attention_span(Packed.from_mask(mask), 1, causal=False).tolist() == [999.0]
    assert attention_span(Packed.from_mask(mask), 1, causal=True).tolist() == [999.0 / 2]


def test_rates_count_real_tokens() -> None:
    active = torch.tensor([[[True, False], [True, True], [False, False]], [[False, False]] * 3])
    valid = torch.tensor([[True, True, False], [False] * 3])
    routing = Routing(active, active.float(), valid, torch.zeros(2, 3, dtype=torch.int64))
    assert activation_rate({"a": routing})["a"].tolist() == [[1.0, 0.5], [0.0, 0.0]]


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.5, 1.0])
def test_operations_follow_the_rate(rate: float) -> None:
    layer = SparselyActivated(
        nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)), FixedRate.Config(rate=rate).build()
    )
    x = torch.randn(2, 20, 8)
    replay_name = "layer"

    class Out:
        def __init__(self, routing: Routing) -> None:
            self.routings = {replay_name: routing}

    count = operations(lambda replay: Out(layer(x, replay=replay[replay_name] if replay else None).routing))
    dense = 2 * (8 * 32 + 32 * 8) * 40  # two operations for each multiplication
    assert count.always_on == dense
    assert count.spent == rate * dense
    assert count.saved == pytest.approx(1 - rate)


def test_always_on_costs_what_the_plain_module_costs() -> None:
    module, x = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)), torch.randn(3, 10, 8)
    layer = SparselyActivated(module, Always.Config().build())
    assert count_flops(lambda: layer(x)) == count_flops(lambda: module(x)) > 0


def test_a_fourier_transform_counts() -> None:
    assert count_flops(lambda: torch.fft.rfft(torch.randn(64))) == pytest.approx(2.5 * 64 * 6)


def test_all_active_keeps_padding_off() -> None:
    valid = torch.tensor([[True, False, True]])
    routing = Routing(
        torch.zeros(1, 3, 2, dtype=torch.bool), torch.zeros(1, 3, 2), valid, torch.zeros(1, 3, dtype=torch.int64)
    )
    assert all_active(routing).active.tolist() == [[[True, True], [False, False], [True, True]]]
