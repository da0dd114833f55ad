"""Laws 1 and 3: a sequence is its own world, and causal means causal."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from sma.testing.base import SIDES, SequenceSuite, few, law, lengths_of_rows


class WorldLaws(SequenceSuite):
    """Outputs and decisions depend on the own sequence only, and where promised on its past only."""

    @law("batch independence")
    @few
    @given(lengths=lengths_of_rows, side=st.sampled_from(SIDES), extra=st.integers(0, 3))
    def test_a_row_is_what_it_is_alone(self, lengths: list[int], side: str, extra: int) -> None:
        module, rows = self.module(), self.rows(lengths)
        x, valid = self.pad(rows, self.side(side), extra)
        self.assert_rows_agree(self.call(module, x, valid=valid), valid, self.alone(module, rows))

    @law("batch independence")
    def test_order_of_the_batch(self) -> None:
        module, order = self.module(), torch.tensor([2, 0, 3, 1])
        x, valid = self.pad(self.rows([5, 2, 7, 4]), self.sides[-1])
        y = self.call(module, x, valid=valid).y
        moved = self.call(module, x[order], valid=valid[order]).y
        if self.per_token:
            y, moved = y[order][valid[order]], moved[valid[order]]
        else:
            y = y[order]
        self.assert_close(moved, y, "batch in another order")

    @law("batch independence")
    def test_content_of_the_padding(self) -> None:
        module, rows = self.module(), self.rows([5, 0, 7, 1])
        for side in self.sides:
            x, valid = self.pad(rows, side, extra=2)
            other = self.garbage(self.inputs(*x.shape[:2]))
            other[valid] = x[valid]
            before, after = (self.call(module, batch, valid=valid).y for batch in (x, other))
            if self.per_token:
                before, after = before[valid], after[valid]
            self.assert_close(after, before, f"other content of the padding ({side})")

    @law("batch independence", when="real_input")
    def test_gradient_of_the_padding(self) -> None:
        module = self.module()
        x, valid = self.pad(self.rows([4, 0, 6]), self.sides[-1], extra=1)
        x.requires_grad_()
        y = self.call(module, x, valid=valid).y
        (grad,) = torch.autograd.grad((y[valid] if self.per_token else y).square().sum(), x)
        assert not grad[~valid].any(), "padding has a gradient: the output depends on it"
        assert grad[valid].isfinite().all()
        assert grad[valid].any(), "no real token has a gradient"

    @law("batch independence", when="real_input")
    def test_gradient_of_batch_mates(self) -> None:
        module = self.module()
        x, valid = self.pad(self.rows([4, 20, 6]), self.sides[-1])
        x.requires_grad_()
        y = self.call(module, x, valid=valid).y[1]
        (grad,) = torch.autograd.grad((y[valid[1]] if self.per_token else y).square().sum(), x)
        assert not grad[0].any(), "the gradient reaches another row of the batch"
        assert not grad[2].any(), "the gradient reaches another row of the batch"
        assert grad[1].any(), "the row itself has no gradient"

    @law("causality", when="tokens_are_causal")
    @few
    @given(cut=st.integers(0, 9))
    def test_the_past_does_not_depend_on_the_future(self, cut: int) -> None:
        module = self.module()
        x, y = self.inputs(2, 9), self.inputs(2, 9)
        y[:, :cut] = x[:, :cut]
        before, after = self.call(module, x), self.call(module, y)
        self.assert_close(after.y[:, :cut], before.y[:, :cut], "outputs before the change")
        for name, routing in before.routings.items():
            same = torch.equal(routing.active[:, :cut], after.routings[name].active[:, :cut])
            assert same, f"decisions {name!r} before the change"
            self.assert_close(
                after.routings[name].confidence[:, :cut],
                routing.confidence[:, :cut],
                f"confidence {name!r} before the change",
            )

    @law("causality", when="real_and_causal")
    @few
    @given(cut=st.integers(1, 8))
    def test_no_gradient_from_the_future(self, cut: int) -> None:
        module, x = self.module(), self.inputs(2, 9).requires_grad_()
        (grad,) = torch.autograd.grad(self.call(module, x).y[:, :cut].square().sum(), x)
        # Not exactly zero: a convolution by Fourier transform rounds.
        self.assert_close(grad[:, cut:], torch.zeros_like(grad[:, cut:]), "gradient of later tokens")
