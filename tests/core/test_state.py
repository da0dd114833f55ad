"""States are values: nested, cloned, moved, reordered, rolled back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sma import load_state, save_state
from sma.errors import CheckpointError, StreamingError
from sma.state import State, StateHistory, difference, misfit
from sma.weights import write_tensors


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
    assert list(map(id, state.tensors())) == list(map(id, state.named_tensors().values()))
    assert state.nbytes == 3 * 8 + 6 * 4 + 12 * 4 + 3 * 8


def test_states_of_one_form_fit_each_other() -> None:
    state = nested()

    def differs(other: Outer) -> bool:
        problem = difference(state, other.kinds(), other.named_tensors())
        assert (other.form() != state.form()) == (problem is not None)
        assert misfit(state, other) == misfit(state, other, state.form()) == problem
        return problem is not None

    assert not differs(state.reorder(torch.tensor([1])).to(dtype=torch.float16))
    assert not differs(replace(state, layers=(replace(state.layers[0], name="another"), *state.layers[1:])))
    assert differs(replace(state, count=torch.ones(3, 1)))
    assert differs(replace(state, layers=state.layers[1:]))
    assert differs(replace(state, layers=(state.layers[0], state.layers[2], state.layers[2])))
    assert differs(replace(state, layers=(state, *state.layers[1:])))
    assert differs(replace(state, more={"y": state.more["x"]}))
    assert misfit(state, replace(state, count=torch.ones(4, dtype=torch.int64))) is not None, "two batches in one"


def test_other_tensors_in_the_same_state() -> None:
    state = nested()
    others = [tensor + 1 for tensor in state.tensors()]
    changed = state.with_tensors(others)
    assert changed.form() == state.form()
    assert all(one is other for one, other in zip(changed.tensors(), others, strict=True))


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


def test_rows_of_several_states() -> None:
    one, other = nested(), nested()
    both = State.cat([one, other])
    assert [tensor.shape[0] for tensor in both.tensors()] == [6] * 4
    for tensor, first, second in zip(both.tensors(), one.tensors(), other.tensors(), strict=True):
        assert torch.equal(tensor, torch.cat([first, second]))
    assert torch.equal(both.select(4, 1).layers[0].keys, torch.stack([other.layers[0].keys[1], one.layers[0].keys[1]]))
    put = one.put(torch.tensor([2, 0]), other.select(0, 1))
    assert torch.equal(
        put.layers[0].keys, torch.stack([other.layers[0].keys[1], one.layers[0].keys[1], other.layers[0].keys[0]])
    )
    assert one.more["x"].shape == (3, 1)


def test_states_that_do_not_fit_each_other() -> None:
    one = nested()
    with pytest.raises(StreamingError, match="needs at least one state"):
        State.cat([])
    with pytest.raises(StreamingError, match=r"state: layers.2.keys must be \(B, 4\), got \(B, 5\)"):
        State.cat([one, replace(one, layers=(one.layers[0], None, Inner(torch.zeros(3, 5))))])
    with pytest.raises(StreamingError, match=r"state: layers.2 must be Inner, got absent"):
        State.cat([one, replace(one, layers=one.layers[:2])])
    with pytest.raises(StreamingError, match=r"state: layers.1 must be absent, got Inner"):
        one.put(
            torch.tensor([0]),
            replace(one.select(0), layers=(one.select(0).layers[0],) * 2 + (one.select(0).layers[2],)),
        )
    with pytest.raises(StreamingError, match="the whole must be Outer, got Inner"):
        State.cat([one, Inner(torch.zeros(3, 2))])
    with pytest.raises(StreamingError, match=r"every tensor must be of one batch, got \[2, 3\]"):
        State.cat([one, replace(one, count=torch.arange(2))])


def test_files(tmp_path: Path) -> None:
    state, path = nested().detach(), tmp_path / "state.safetensors"
    save_state(state, path)
    back = load_state(path, nested().select(1))
    assert back.layers[2].name == "inner" or back.layers[2].name == "other"
    for tensor, same in zip(back.tensors(), state.tensors(), strict=True):
        assert tensor.dtype == same.dtype
        assert torch.equal(tensor, same)
    half = load_state(path, nested().to(dtype=torch.bfloat16))
    assert [tensor.dtype for tensor in half.tensors()] == [torch.int64] + [torch.bfloat16] * 3


def test_files_that_are_no_state(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    with pytest.raises(CheckpointError, match="no such file"):
        load_state(path, nested())
    save_state(nested().detach(), path)
    with pytest.raises(CheckpointError, match=r"does not fit the model: the whole must be Inner, got Outer"):
        load_state(path, Inner(torch.zeros(1, 2)))
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        load_state(path, nested())
    write_tensors({"count": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="holds no state"):
        load_state(path, nested())
    for said, message in (("{", "cannot be read"), ("[]", "must be a mapping, got list")):
        write_tensors({"count": torch.zeros(3)}, path, {"sma_state": said})
        with pytest.raises(CheckpointError, match=message):
            load_state(path, nested())
    state = nested().detach()
    save_state(replace(state, count=state.count.float()), path)
    with pytest.raises(CheckpointError, match=r"count must be torch\.int64, got torch\.float32"):
        load_state(path, nested())
