"""Working memory against a list that forgets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sma import Packed, WorkingMemory
from sma.errors import StreamingError

MASKS = st.lists(
    st.integers(0, 6).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=2, max_size=2)
    ),
    max_size=4,
)


def contents(memory: WorkingMemory) -> list[list[float]]:
    """The remembered tokens of every sequence, oldest first."""
    rows = memory.rows[0].squeeze(-1)
    return [row[memory.capacity - n :].tolist() for row, n in zip(rows, memory.lengths.tolist(), strict=True)]


@given(chunks=MASKS, capacity=st.integers(0, 5))
def test_remembers_the_last_tokens(chunks: list[list[list[bool]]], capacity: int) -> None:
    memory = WorkingMemory.empty(2, capacity, torch.zeros(0, 1))
    stream: list[list[float]] = [[], []]
    for mask in chunks:
        packed = Packed.from_mask(torch.tensor(mask, dtype=torch.bool).view(2, -1))
        new = torch.rand(packed.index.numel(), 1) + 1
        before, size = contents(memory), memory.nbytes
        rows, cu, start, memory = memory.append(packed, new)
        for b in range(2):
            arrived = new[packed.sequence == b].flatten().tolist()
            assert rows[0][cu[b] : cu[b + 1]].flatten().tolist() == before[b] + arrived
            assert int(start[b]) == len(stream[b]) - len(before[b])
            stream[b] += arrived
            assert contents(memory)[b] == stream[b][max(len(stream[b]) - capacity, 0) :]
            assert int(memory.count[b]) == len(stream[b])
        assert memory.nbytes == size
        unused = torch.arange(capacity) < capacity - memory.lengths[:, None]
        assert not memory.rows[0].squeeze(-1)[unused].any()


def _chunk() -> tuple[Packed, Tensor]:
    return Packed.from_mask(torch.tensor([[True, True], [False, True]])), torch.tensor([[1.0], [2.0], [3.0]])


def _after(capacity: int, packed: Packed, rows: Tensor) -> WorkingMemory:
    """The memory of a stream's first chunk."""
    return WorkingMemory.empty(packed.batch, capacity, rows).append(packed, rows).memory


def test_append_leaves_the_old_memory_alone() -> None:
    packed, rows = _chunk()
    memory = _after(2, packed, rows)
    copy = memory.clone()
    memory.append(packed, -rows)
    assert all(torch.equal(a, b) for a, b in zip(memory.tensors(), copy.tensors(), strict=True))


def test_gradient_goes_back_through_the_memory() -> None:
    packed, rows = _chunk()
    rows.requires_grad_()
    memory = _after(1, packed, rows)
    (both,), _, _, _ = memory.append(packed, 10 * rows)
    (grad,) = torch.autograd.grad(both.sum(), rows)
    assert grad.flatten().tolist() == [10, 11, 11]


def test_reorder_takes_rows_along() -> None:
    packed, rows = _chunk()
    memory = _after(2, packed, rows).reorder(torch.tensor([1, 1, 0]))
    assert contents(memory) == [[3.0], [3.0], [1.0, 2.0]]


def test_takes_the_dtype_of_new_rows() -> None:
    packed, rows = _chunk()
    both, _, _, memory = _after(2, packed, rows).append(packed, rows.bfloat16())
    assert both[0].dtype == memory.rows[0].dtype == torch.bfloat16


def test_what_does_not_fit_is_refused() -> None:
    packed, rows = _chunk()
    with pytest.raises(StreamingError, match="holds 3 sequences, the batch of new tokens has 2"):
        WorkingMemory.empty(3, 2, rows).append(packed, rows)
    with pytest.raises(
        StreamingError, match=r"remembers rows of shapes \[\(1,\)\], the new tokens have \[\(1,\), \(1,\)\]"
    ):
        WorkingMemory.empty(2, 2, rows).append(packed, rows, rows)
