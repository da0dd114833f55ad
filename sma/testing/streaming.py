"""Laws 4 and 7: whole sequences, chunks and single steps agree, and the state is bounded and a value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from sma.decode.choice import stepper_of
from sma.errors import StreamingError
from sma.state import State, StateHistory
from sma.steppers import SlotSpec, StepContext
from sma.testing.base import SIDES, Result, SequenceSuite, cuts, few, law


class StreamingLaws(SequenceSuite):
    """What can stream does so in chunks of any size; what cannot says so."""

    def stream(
        self, module: nn.Module, rows: Sequence[Tensor], deal: Sequence[Sequence[int]], side: str
    ) -> list[Tensor]:
        """Outputs of each row when chunk c takes ``deal[c][b]`` of the tokens of row b."""
        state = self.start(module, len(rows), rows[0])
        outputs: list[list[Tensor]] = [[] for _ in rows]
        at = [0] * len(rows)
        for counts in deal:
            chunk = [row[start : start + n] for row, start, n in zip(rows, at, counts, strict=True)]
            at = [start + len(part) for start, part in zip(at, chunk, strict=True)]
            x, valid = self.pad(chunk, side)
            result = self.call(module, x, state, valid=None if valid.all() else valid)
            state = result.state
            assert state is not None, "a call with a state returns the next one"
            for b, parts in enumerate(outputs):
                parts.append(result.y[b, valid[b]])
        return [torch.cat(parts) for parts in outputs]

    @law("parallel = chunks = steps", when="streams")
    @few
    @given(
        deal=st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=6),
        side=st.sampled_from(SIDES),
    )
    def test_any_chunks(self, deal: list[list[int]], side: str) -> None:
        module = self.module()
        rows = self.rows([sum(counts[b] for counts in deal) for b in range(3)])
        outputs = self.stream(module, rows, deal, self.side(side))
        for b, alone in enumerate(self.alone(module, rows)):
            self.assert_close(outputs[b], alone.y[0], f"row {b}")

    @law("parallel = chunks = steps", when="streams")
    def test_every_cut_in_two_and_single_steps(self) -> None:
        module, length = self.module(), 9
        rows = self.rows([length, length])
        whole = self.call(module, torch.stack(rows)).y
        for sizes in cuts(length):
            outputs = self.stream(module, rows, [[n, n] for n in sizes], "right")
            self.assert_close(torch.stack(outputs), whole, f"chunks of {sizes}")

    @law("parallel = chunks = steps", when="streams")
    def test_a_long_stream_of_steps(self) -> None:
        module, length = self.module(), 3 * self.memory
        rows = self.rows([length])
        outputs = self.stream(module, rows, [[1]] * length, "right")
        self.assert_close(outputs[0], self.call(module, rows[0][None]).y[0], "single steps")

    @law("parallel = chunks = steps")
    def test_no_state_in_no_state_out(self) -> None:
        assert self.call(self.module(), self.inputs(2, 4)).state is None

    @law("parallel = chunks = steps", when="refuses_to_stream")
    def test_streaming_is_refused(self) -> None:
        module = self.module()
        with pytest.raises(StreamingError):
            self.start(module, 2, self.inputs(2, 1))

    @law("parallel = chunks = steps", when="decodes")
    def test_steps_in_place(self) -> None:
        """Slots that go on at different speeds, take tokens back, and begin and end as a state."""
        module, length, begun = self.module(), 2 * self.memory, 3
        rows = torch.stack(self.rows([length + 1] * 2))
        whole = self.call(module, rows).y
        slots, at = torch.arange(2), [begun] * 2
        stepper: Any = stepper_of(module, SlotSpec(2, 1, rows))
        stepper.write(slots, self._warm(module, rows[:, :begun]), torch.tensor(at))
        generator = torch.Generator().manual_seed(0)
        while max(at) < length:
            live = torch.rand(2, generator=generator) < 0.7
            for wrong in (True, False):  # a draft that is taken back, and then the token
                x = torch.stack([rows[b, at[b]] for b in range(2)])
                with torch.no_grad():
                    out = stepper.step(self.garbage(x) if wrong else x, StepContext(live, torch.tensor(at)))
                for b in slots[live].tolist() if wrong else []:
                    stepper.rolled_back(b, 1)
            y = out if isinstance(out, Tensor) else out[0]
            for b in slots[live].tolist():
                self.assert_close(y[b], whole[b, at[b]], f"row {b}, token {at[b]}")
                at[b] += 1
        state = stepper.read(slots, torch.tensor(at))
        last = torch.stack([rows[b, at[b]] for b in range(2)])[:, None]
        after = self._after(module, last, state)
        for b in range(2):
            self.assert_close(after.y[b, 0], whole[b, at[b]], f"row {b}, after it was read")

    @law("bounded state", when="streams")
    def test_size_of_the_state(self) -> None:
        module = self.module()
        state, sizes = self.start(module, 2, self.inputs(2, 1)), []
        for _ in range(4 * self.memory):
            state = self._after(module, self.inputs(2, 1), state).state
            assert state is not None
            sizes.append(state.nbytes)
        assert max(sizes[2 * self.memory :]) <= max(sizes[: 2 * self.memory]), f"the state grows: {sizes}"

    @law("bounded state", when="streams")
    def test_forward_does_not_change_its_state(self) -> None:
        module = self.module()
        before = self._warm(module, self.inputs(2, 5))
        copy = before.clone()
        self._after(module, self.inputs(2, 4), before)
        assert all(map(torch.equal, before.tensors(), copy.tensors())), "forward changed the state that it was given"
        shared = {t.untyped_storage().data_ptr() for t in before.tensors() if t.numel()}
        assert not shared & {t.untyped_storage().data_ptr() for t in copy.tensors() if t.numel()}, "clone shares memory"

    @law("bounded state", when="streams")
    def test_reorder(self) -> None:
        module, order = self.module(), torch.tensor([2, 0, 0, 1])
        prompt, x = self.inputs(3, 5), self.inputs(4, 3)
        moved = self.call(module, x, self._warm(module, prompt).reorder(order))
        straight = self.call(module, x, self._warm(module, prompt[order]))
        self.assert_close(moved.y, straight.y, "after reorder")

    @law("bounded state", when="streams")
    def test_roll_back(self) -> None:
        module, history = self.module(), StateHistory[State](limit=3)
        state = self._warm(module, self.inputs(2, 4))
        history.push(state)
        expected = self.call(module, x := self.inputs(2, 2), state.clone()).y
        for _ in range(3):
            next_state = self._after(module, self.inputs(2, 1), state).state
            assert next_state is not None
            history.push(state := next_state)
        self.assert_close(self.call(module, x, history.rollback(3)).y, expected, "after a roll-back")

    @law("bounded state", when="streams")
    def test_dtype_of_the_state(self) -> None:
        module = self.module()
        state = self._warm(module, self.inputs(2, 4))
        assert all(t.dtype == torch.float64 for t in state.tensors() if t.is_floating_point())
        narrow = state.to(dtype=torch.float32)
        for tensor, same in zip(narrow.tensors(), state.tensors(), strict=True):
            assert tensor.dtype == (torch.float32 if same.is_floating_point() else same.dtype)
        x = self.inputs(2, 3)
        wide = self.call(module, x, narrow.to(dtype=torch.float64)).y
        expected = self.call(module, x, state).y
        assert float((wide - expected).detach().abs().max()) < 1e-4 * max(1.0, float(expected.detach().abs().max()))

    @law("bounded state", when="streams")
    def test_state_has_the_batch_first(self) -> None:
        assert {t.shape[0] for t in self._warm(self.module(), self.inputs(3, 2)).tensors()} <= {3}

    def _after(self, module: nn.Module, x: Tensor, state: State | None) -> Result:
        with torch.no_grad():
            return self.call(module, x, state)

    def _warm(self, module: nn.Module, x: Tensor) -> State:
        state = self._after(module, x, self.start(module, x.shape[0], x)).state
        assert state is not None
        return state
