"""States are values: nested, cloned, moved, reordered, rolled back."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sma.errors import StreamingError
from sma.state import State, StateHistory


@dataclass(frozen=True)
class Inner(State):
    keys: Tensor
    name: str = "inner"


@dataclass(frozen=True)
class Outer(State):
    count: Tensor
    layers: tuple[Inner | None, ...]
    more: dict[str, Tensor]


def nested() -> Outer:
    return Outer(
        torch.arange(3),
        (Inner(torch.randn(3, 2, requires_grad=True)), None, Inner(torch.randn(3, 4), "other")),
        {"x": torch.ones(3, 1, dtype=torch.float64)},
    )


def test_every_tensor_is_reached() -> None:
    state = nested()
    assert [tuple(tensor.shape) for tensor in state.tensors()] == [(3,), (3, 2), (3, 4), (3, 1)]
    assert state.nbytes == 3 * 8 + 6 * 4 + 12 * 4 + 3 * 8


def test_clone_and_detach() -> None:
    state = nested()
    copy = state.clone()
    for one, other in zip(state.tensors(), copy.tensors(), strict=True):
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()
    assert copy.layers[2].name == "other"
    assert state.layers[0].keys.requires_grad
    assert not any(tensor.requires_grad for tensor in state.detach().tensors())


def test_reorder_takes_rows_and_repeats_them() -> None:
    moved = nested().reorder(torch.tensor([2, 0, 0, 1]))
    assert moved.count.tolist() == [2, 0, 0, 1]
    assert [tensor.shape[0] for tensor in moved.tensors()] == [4] * 4


def test_dtype_changes_numbers_only() -> None:
    moved = nested().to("cpu", torch.bfloat16)
    assert [tensor.dtype for tensor in moved.tensors()] == [torch.int64] + [torch.bfloat16] * 3
    assert [tensor.device.type for tensor in nested().to("meta").tensors()] == ["meta"] * 4
    assert [tensor.dtype for tensor in nested().to("meta").tensors()] == [t.dtype for t in nested().tensors()]


def test_the_history_is_bounded() -> None:
    history: StateHistory[Inner] = StateHistory(limit=2)
    states = [Inner(torch.full((1,), float(i))) for i in range(5)]
    for state in states:
        history.push(state)
    assert len(history) == 3
    assert history.rollback(0) is states[4]
    assert history.rollback(2) is states[2]
    assert len(history) == 1
    with pytest.raises(StreamingError, match="cannot roll back 1 steps, 1 states are remembered"):
        history.rollback(1)
    with pytest.raises(StreamingError, match="cannot roll back -1 steps"):
        history.rollback(-1)
    with pytest.raises(StreamingError, match="limit must be at least 1, got 0"):
        StateHistory(limit=0)
