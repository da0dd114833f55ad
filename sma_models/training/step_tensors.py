"""The tensors of captured steps, and the report of the device about a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sma.routing import Routing
from sma_models.training.objective import Score
from sma_models.training.steps import PartResult, StepResult, Work


class StepTensors:
    """The tensors that captured passes and the captured update share; the addresses never change.

    Attributes:
        sums: of the parts of a step: loss, entropy, right answers, answers.
        report: the share of active tokens in every automatic layer and module; the last entry is 1 from a skipped
            step on.
        skips: the optimiser skips such a step by itself.
    """

    def __init__(self, work: Work, n_modules: int) -> None:
        self.work = work
        self.sums = torch.zeros(4, dtype=torch.float64, device=work.device)
        self.report = torch.zeros(n_modules + 1, device=work.device)
        self.norm = torch.zeros((), device=work.device)
        self.gradients = {each: torch.zeros_like(each) for each in work.trained if each.grad is not None}
        self.skips = bool(work.optimiser.param_groups[0].get("fused"))
        self.buffers = list(work.model.buffers())
        self.kept = [buffer.clone() for buffer in self.buffers]

    @torch.no_grad()
    def take(self, part: PartResult, usage: Sequence[tuple[Tensor, Tensor]]) -> None:
        """After the passes over a part: add up gradients and scores, record the capacities that the layers needed."""
        fresh = [each.grad for each in self.gradients]
        if self.work.recipe.train.accumulate == 1:
            torch._foreach_copy_(list(self.gradients.values()), fresh)
        else:
            torch._foreach_add_(list(self.gradients.values()), fresh)
        self.work.optimiser.zero_grad()
        answers = part.answers
        self.sums += torch.stack([each.double() for each in (part.loss, answers.loss, answers.correct, answers.count)])
        if usage:
            shares, overflows = (torch.stack(each).float() for each in zip(*usage, strict=True))
            self.report[:-1].copy_(torch.maximum(self.report[:-1], shares))
            self.report[-1:].copy_(torch.maximum(self.report[-1:], (overflows > 0).any()[None].float()))

    @torch.no_grad()
    def update(self) -> None:
        """After the last part; a skipped step changes nothing."""
        optimiser: Any = self.work.optimiser
        for parameter, gradient in self.gradients.items():
            parameter.grad = gradient
        if self.skips:
            optimiser.found_inf = self.report[-1]
        try:
            norm = self.work.update(norm=True)
        finally:
            if self.skips:
                del optimiser.found_inf
        assert norm is not None
        self.norm.copy_(norm)
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            kept.copy_(torch.where(self.report[-1] > 0, kept, buffer))
        torch._foreach_zero_(list(self.gradients.values()))
        optimiser.zero_grad()

    @torch.no_grad()
    def keep(self) -> None:
        """Take over the buffers of a step that was run without a graph."""
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            kept.copy_(buffer)

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the last step that was not skipped, after passes whose results are not wanted."""
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            buffer.copy_(kept)
        torch._foreach_zero_([self.sums, self.report, *self.gradients.values()])
        self.work.forget_counts()
        self.work.optimiser.zero_grad()

    def result(self, routings: Mapping[str, Routing]) -> StepResult:
        """The result of the last step."""
        loss, entropy, correct, count = self.sums.unbind()
        answers = Score(entropy, correct.long(), count.long())
        return StepResult(loss, answers, routings, self.norm)


class DeviceReport:
    """The report of the device about a step: the largest share of active tokens in each automatic layer and module, and
    whether the step was skipped.
    """

    def __init__(self, report: Tensor) -> None:
        self.values = _pinned(report) if report.is_cuda else report.clone()
        self.event = torch.cuda.Event() if report.is_cuda else None  # type: ignore[no-untyped-call]
        if self.event is not None:
            self.event.record()

    def read(self) -> tuple[list[float], bool]:
        """Both; synchronises with the device up to this step."""
        if self.event is not None:
            self.event.synchronize()
        *usage, skipped = self.values.tolist()
        return usage, bool(skipped)


def _pinned(report: Tensor) -> Tensor:
    return torch.empty(report.shape, dtype=report.dtype, pin_memory=True).copy_(report, non_blocking=True)
