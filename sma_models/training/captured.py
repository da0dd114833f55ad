"""Training steps as CUDA graphs: a step is launched by two calls, however many kernels it has.

A graph has fixed shapes, so the layers get a fixed capacity (:meth:`~sma.layer.SparseMixture.with_capacity`). Where the
spec names none, it is chosen here, and nothing is ever lost by it: a step in which a layer had more active tokens than
room does not count. Its update is skipped on the device, which knows first; the host hears of it while the next step
runs, does the step again without a capacity, and gives the layer more room.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from sma.errors import ConfigError
from sma.layer import SparseMixture
from sma.routing import Routing
from sma.runtime.cuda_graphs import capturing, waiting_forbidden
from sma_models.training.data.batches import Batch
from sma_models.training.objective import Score
from sma_models.training.steps import EagerSteps, Part, StepResult, Work

MARGIN = 1.25
"""Room for this many times the tokens that were active."""
GRID = 2**0.25
"""Rooms are the whole batch divided by powers of this, so that they seldom change."""
SMALLEST = GRID**-16
"""So few rows cost next to nothing, and less room would often not suffice, as small rates change the most."""
FIRST_WINDOW, WINDOW = 8, 512
"""After so many steps a layer that needed less room than it has gets less; the first windows double, as an untrained
layer says little about a trained one."""
MOST_SHAPES = 8
"""Batches of further shapes are run without a graph."""

Signature = tuple[tuple[str, tuple[int, ...], torch.dtype] | None, ...]


def room_for(usage: float) -> float:
    """The share of a batch's tokens that a layer gets room for, of which ``usage`` were active."""
    needed = max(MARGIN * usage, SMALLEST)
    return min(1.0, GRID ** -math.floor(-math.log(needed) / math.log(GRID))) if needed < 1 else 1.0


class Graphs(Protocol):
    """A way to capture what is queued for a device. Tests have one for the CPU, which runs the function again."""

    def rehearse(self, work: Callable[[], Any]) -> None:
        """Run ``work`` as it will be captured; raises RuntimeError if it waits for the device."""

    def capture(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """What does the work again, in and to the same tensors, and what the captured call returned."""


class CudaGraphs:
    """CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.pool = torch.cuda.graph_pool_handle()

    def rehearse(self, work: Callable[[], Any]) -> None:
        """See :class:`Graphs`."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream), waiting_forbidden():
            work()
        torch.cuda.current_stream().wait_stream(self.stream)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def capture(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """See :class:`Graphs`."""
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, pool=self.pool, stream=self.stream):
            result = work()
        return graph.replay, result


@dataclass(frozen=True)
class _Passes:
    """The captured passes over a part of one shape.

    Attributes:
        inputs: where the part is put.
        replay: does them.
        routings: that they write.
    """

    inputs: Batch
    replay: Callable[[], None]
    routings: Mapping[str, Routing]

    def put(self, part: Batch) -> None:
        """Let the next replay be of this part."""
        for name, place in self.inputs.items():
            given = part[name]
            if place is not None and given is not None:
                place.copy_(given, non_blocking=True)


@dataclass(frozen=True)
class _Pending:
    """A step that was launched, and may turn out not to count."""

    step: int
    parts: tuple[Batch, ...]
    norm: bool
    heard: _Heard


class _Heard:
    """What the device reports of a step: the largest share of active tokens in each automatic layer, and whether the
    step did not count.
    """

    def __init__(self, report: Tensor) -> None:
        self.values = _pinned(report) if report.is_cuda else report.clone()
        self.event = torch.cuda.Event() if report.is_cuda else None  # type: ignore[no-untyped-call]
        if self.event is not None:
            self.event.record()

    def wait(self) -> tuple[list[float], bool]:
        """Both, once they are known."""
        if self.event is not None:
            self.event.synchronize()
        *usage, halted = self.values.tolist()
        return usage, bool(halted)


def _pinned(report: Tensor) -> Tensor:
    return torch.empty(report.shape, dtype=report.dtype, pin_memory=True).copy_(report, non_blocking=True)


class CapturedSteps:
    """Runs steps as graphs: one for the passes over a part of each shape, and one for the update.

    The first batch of a shape runs without a graph, and shows how much room the layers need; the second is captured.

    Args:
        work: what a step does.
        required: refuse a model that cannot be captured, instead of going on without graphs.
        graphs: how to capture.

    Attributes:
        why_not: why nothing is captured; None where that is possible.
        captured: how often passes were captured.
        again: steps that were done again, as there had been no room in them or in the one before.

    Raises:
        ConfigError: from :meth:`run`, if ``required`` and the model cannot be captured.
    """

    def __init__(self, work: Work, *, required: bool = False, graphs: Graphs | None = None) -> None:
        self.work = work
        self.required = required
        self.graphs: Graphs = graphs or CudaGraphs()
        self.why_not: str | None = None
        self.captured = 0
        self.again = 0
        self._eager = EagerSteps(work)
        layers = [module for module in work.model.modules() if isinstance(module, SparseMixture)]
        self._rooms: dict[SparseMixture, float] = {layer: SMALLEST for layer in layers if layer.capacity is None}
        self._recent = dict.fromkeys(self._rooms, 0.0)
        self._since, self._window = 0, FIRST_WINDOW
        self._seen: set[Signature] = set()
        self._passes: dict[Signature, _Passes] = {}
        self._update: Callable[[], None] | None = None
        self._tensors: _Tensors | None = None
        self._pending: deque[_Pending] = deque()
        self._result: Callable[[], StepResult] = self._eager.settle

    # Steps

    def run(self, step: int, parts: Sequence[Batch], *, norm: bool = False) -> None:
        """See :class:`~sma_models.training.steps.Steps`."""
        passes = self._passes_for(parts)
        if passes is None:
            self._run_eagerly(step, parts, norm)
            return
        work, tensors = self.work, self._ready()
        assert self._update is not None
        work.set_rate(step)
        torch._foreach_zero_([tensors.sums, tensors.report[:-1]])
        for number, (part, pass_) in enumerate(zip(parts, passes, strict=True)):
            pass_.put(part)
            work.prepare(step, number)
            pass_.replay()
        if self._rooms:
            self._pending.append(_Pending(step, tuple(parts), norm, _Heard(tensors.report)))
            if not tensors.skips and not self._verify():  # the optimiser cannot skip a step by itself
                return
        self._update()
        routings = passes[-1].routings
        self._result = lambda: tensors.result(self._without_automatic(routings))
        if len(self._pending) > 1:
            self._verify()

    def settle(self) -> StepResult:
        """See :class:`~sma_models.training.steps.Steps`; waits for the device."""
        self._verify_all()
        return self._result()

    def _run_eagerly(self, step: int, parts: Sequence[Batch], norm: bool) -> None:
        self._verify_all()
        self._eager.run(step, parts, norm=norm)
        self._result = self._eager.settle
        if self._tensors is not None:
            self._tensors.keep()
            self.work.optimiser.zero_grad()  # captured passes have gradients of their own
        if self.why_not is None:
            self._observe(self._eager.settle().routings)

    def _verify_all(self) -> None:
        while self._pending:
            self._verify()

    def _verify(self) -> bool:
        """Hear of the oldest step that may not count; if it did not, do it and all later ones again."""
        pending = self._pending.popleft()
        usage, halted = pending.heard.wait()
        if halted:
            again = [pending, *self._pending]
            self._pending.clear()
            self._ready().restore()
            self._forget()
            self.again += len(again)
            for each in again:
                self._run_eagerly(each.step, each.parts, each.norm)
            return False
        self._note(dict(zip(self._modules(), usage, strict=True)))
        return True

    # Rooms

    def _modules(self) -> list[tuple[SparseMixture, int]]:
        return [(layer, m) for layer in self._rooms for m in range(layer.configurator.n_modules)]

    def _observe(self, routings: Mapping[str, Routing]) -> None:
        """Learn from a step without a capacity how much room is needed."""
        usage: dict[tuple[SparseMixture, int], float] = {}
        for name, routing in routings.items():
            layer = self.work.layer(name)
            if layer in self._rooms:
                shares = (routing.active.sum((0, 1)) / max(1, routing.valid.numel())).tolist()
                for m, share in enumerate(shares):
                    usage[layer, m] = max(share, usage.get((layer, m), 0.0))
        self._note(usage)

    def _note(self, usage: Mapping[tuple[SparseMixture, int], float]) -> None:
        for (layer, _), share in usage.items():
            self._recent[layer] = max(self._recent[layer], share)
        self._since += 1
        wanted = {layer: room_for(share) for layer, share in self._recent.items()}
        if any(wanted[layer] > room for layer, room in self._rooms.items() if self._recent[layer] > room):
            self._set_rooms({layer: max(room, wanted[layer]) for layer, room in self._rooms.items()})
        elif self._since >= self._window:
            if any(wanted[layer] < room / GRID for layer, room in self._rooms.items()):
                self._set_rooms(wanted)
            self._recent, self._since = dict.fromkeys(self._rooms, 0.0), 0
            self._window = min(2 * self._window, WINDOW)

    def _set_rooms(self, rooms: Mapping[SparseMixture, float]) -> None:
        self._rooms = dict(rooms)
        self._forget()

    def _forget(self) -> None:
        """Drop the passes, whose rooms are no longer those wanted."""
        if self._passes and self.work.device.type == "cuda":
            torch.cuda.synchronize()  # one of them may be running
        self._passes = {}

    # Captures

    def _passes_for(self, parts: Sequence[Batch]) -> list[_Passes] | None:
        """The captured passes for each part, captured now if an earlier step had such parts; None to run eagerly."""
        if self.why_not is not None:
            return None
        signatures = [_signature(part) for part in parts]
        if not self._seen.issuperset(signatures):
            self._seen.update(signatures)
            return None
        if not self._passes.keys() >= set(signatures):
            self._verify_all()  # before the first capture: what a step needed may change the rooms
        for signature, part in zip(signatures, parts, strict=True):
            if signature not in self._passes and not self._capture(signature, part):
                return None
        return [self._passes[signature] for signature in signatures]

    def _capture(self, signature: Signature, part: Batch) -> bool:
        """Capture the passes over such a part, unless that cannot be."""
        if len(self._passes) >= MOST_SHAPES:
            return False
        try:
            self._passes[signature] = self._capture_passes(part)
            self.captured += 1
            self._update = self._update or self._capture_update()
        except (RuntimeError, ConfigError) as error:
            self._give_up(str(error).strip().splitlines()[0])
        return self.why_not is None

    def _give_up(self, reason: str) -> None:
        self.why_not = reason
        if self._tensors is not None:
            self._tensors.restore()
        self._forget()
        self._update, self._tensors = None, None
        if self.required:
            raise ConfigError(f"train.capture: must be false or null for this model, got true: {reason}")

    def _ready(self) -> _Tensors:
        if self._tensors is None:
            self._tensors = _Tensors(self.work, len(self._modules()))
        return self._tensors

    def _capture_passes(self, part: Batch) -> _Passes:
        tensors = self._ready()
        inputs = {name: None if tensor is None else tensor.clone() for name, tensor in part.items()}
        tokens = _tokens(inputs)

        def run() -> Part:
            with self._capacities(tokens):
                result = self.work.forward_backward(inputs)
            tensors.take(result, [self._usage(result, layer, m) for layer, m in self._modules()])
            return result

        self.work.optimiser.zero_grad()
        self.work.prepare(0, 0)
        self.graphs.rehearse(run)
        tensors.restore()
        replay, result = self.graphs.capture(run)
        return _Passes(inputs, _holding(replay, run), result.routings)

    def _capture_update(self) -> Callable[[], None]:
        tensors = self._ready()
        if tensors.skips:
            tensors.report[-1:].fill_(1.0)  # nothing of the rehearsal counts
            self.graphs.rehearse(tensors.update)
            tensors.restore()
        replay, _ = self.graphs.capture(tensors.update)
        return replay

    @contextmanager
    def _capacities(self, tokens: int) -> Iterator[None]:
        """The rooms as capacities of the layers; by half a row less, so that rounding up gives whole blocks of rows."""
        try:
            for layer, room in self._rooms.items():
                rows = min(tokens, 64 * math.ceil(room * tokens / 64))
                layer.with_capacity((rows - 0.5) / tokens)
            yield
        finally:
            for layer in self._rooms:
                layer.with_capacity(None)

    def _usage(self, result: Part, layer: SparseMixture, m: int) -> tuple[Tensor, Tensor]:
        """The share of tokens that were to be active, and how many found no room."""
        shares, overflows = [], []
        for name, routing in result.routings.items():
            if self.work.layer(name) is layer:
                assert routing.overflow is not None
                wanted = routing.active[..., m].sum() + routing.overflow[m]
                shares.append(wanted / routing.valid.numel())
                overflows.append(routing.overflow[m])
        return torch.stack(shares).amax(), torch.stack(overflows).amax()

    def _without_automatic(self, routings: Mapping[str, Routing]) -> dict[str, Routing]:
        """The routings, without the overflow of layers whose capacity nobody asked for: it is zero where it counts."""
        return {
            name: replace(routing, overflow=None) if self.work.layer(name) in self._rooms else routing
            for name, routing in routings.items()
        }


class _Tensors:
    """What captured passes and the captured update share; it stays where it is.

    Attributes:
        sums: of the parts of a step: loss, entropy, right answers, answers.
        report: the share of active tokens in every automatic layer and module, and 1 behind them from a step on that
            does not count.
        skips: the optimiser leaves such a step out by itself.
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
    def take(self, part: Part, usage: Sequence[tuple[Tensor, Tensor]]) -> None:
        """After the passes over a part: add up gradients and scores, note what the layers needed."""
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
        """After the last part; nothing changes in a step that does not count."""
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
        """A step without a graph was done, and counts."""
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            kept.copy_(buffer)

    @torch.no_grad()
    def restore(self) -> None:
        """Go back to the last step that counted, after passes whose results are not wanted."""
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            buffer.copy_(kept)
        torch._foreach_zero_([self.sums, self.report, *self.gradients.values()])
        self.work.forget_counts()
        self.work.optimiser.zero_grad()

    def result(self, routings: Mapping[str, Routing]) -> StepResult:
        """What came of the last step."""
        loss, entropy, correct, count = self.sums.unbind()
        answers = Score(entropy, correct.long(), count.long())
        return StepResult(loss, answers, routings, self.norm)


def _signature(part: Batch) -> Signature:
    return tuple(
        None if tensor is None else (name, tuple(tensor.shape), tensor.dtype) for name, tensor in sorted(part.items())
    )


def _tokens(part: Batch) -> int:
    """How many tokens each layer sees in a part; those of one tower, where there are two."""
    inputs = part.get("tokens") if part.get("tokens") is not None else part.get("values")
    assert inputs is not None
    return inputs.shape[0] * inputs.shape[-1]


def _holding(replay: Callable[[], None], run: Callable[[], Any]) -> Callable[[], None]:
    """``replay``, which knows addresses only, keeping alive what they belong to."""

    def replayed(_run: Callable[[], Any] = run) -> None:
        replay()

    return replayed
