"""Training steps as CUDA graphs: a step is launched by two calls, however many kernels it has.

A graph has fixed shapes, so the layers get a fixed capacity (:meth:`~sma.layer.SparseMixture.with_capacity`). Where the
spec names none, it is chosen here. No token is dropped: a step in which a layer had more active tokens than its
capacity is skipped. The device skips the update by itself. The host reads this while the next step runs. It then runs
the step again without a capacity and raises the capacity of the layer.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sma.errors import ConfigError
from sma.layer import SparseMixture
from sma.routing import Routing
from sma_models.training.data.batches import Batch
from sma_models.training.graphs import CudaGraphs, Graphs, holding
from sma_models.training.step_tensors import DeviceReport, StepTensors
from sma_models.training.steps import EagerSteps, PartResult, StepResult, Work

MARGIN = 1.25
"""The capacity is this many times the number of active tokens."""
GRID = 2**0.25
"""Capacities are the whole batch divided by powers of this, so that they seldom change."""
SMALLEST = GRID**-16
"""The minimum capacity. Fewer rows save nothing and overflow often, as small rates change the most."""
FIRST_WINDOW, WINDOW = 8, 512
"""Steps after which the capacity of a layer that needed less is lowered. The first windows double, as the rates of an
untrained layer say little about later ones."""
MOST_SHAPES = 8
"""Batches of further shapes are run without a graph."""

BatchSignature = tuple[tuple[str, tuple[int, ...], torch.dtype] | None, ...]


def capacity_for(usage: float) -> float:
    """The capacity, as a share of a batch's tokens, of a layer in which the share ``usage`` was active."""
    needed = max(MARGIN * usage, SMALLEST)
    return min(1.0, GRID ** -math.floor(-math.log(needed) / math.log(GRID))) if needed < 1 else 1.0


@dataclass(frozen=True)
class _Passes:
    """The captured passes over a part of one shape.

    Attributes:
        inputs: the buffers for the part.
        replay: runs them.
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
    """A step that was launched, and may turn out to be skipped."""

    step: int
    parts: tuple[Batch, ...]
    norm: bool
    report: DeviceReport


class CapturedSteps:
    """Runs steps as graphs: one for the passes over a part of each shape, and one for the update.

    The first batch of a shape runs without a graph and determines the capacity that the layers need; the second is
    captured.

    Args:
        work: what a step does.
        required: refuse a model that cannot be captured, instead of going on without graphs.
        graphs: how to capture.

    Attributes:
        why_not: why nothing is captured; None where that is possible.
        captured: how often passes were captured.
        again: steps that were run again, as they or the one before had exceeded a capacity.

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
        self._capacities: dict[SparseMixture, float] = {layer: SMALLEST for layer in layers if layer.capacity is None}
        self._recent = dict.fromkeys(self._capacities, 0.0)
        self._since, self._window = 0, FIRST_WINDOW
        self._seen: set[BatchSignature] = set()
        self._passes: dict[BatchSignature, _Passes] = {}
        self._update: Callable[[], None] | None = None
        self._tensors: StepTensors | None = None
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
        if self._capacities:
            self._pending.append(_Pending(step, tuple(parts), norm, DeviceReport(tensors.report)))
            if not tensors.skips and not self._verify():  # the optimiser cannot skip a step by itself
                return
        self._update()
        routings = passes[-1].routings
        self._result = lambda: tensors.result(self._without_automatic(routings))
        if len(self._pending) > 1:
            self._verify()

    def settle(self) -> StepResult:
        """See :class:`~sma_models.training.steps.Steps`; synchronises with the device."""
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
        """Read the report of the oldest pending step; if it was skipped, run it and all later ones again."""
        pending = self._pending.popleft()
        usage, skipped = pending.report.read()
        if skipped:
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

    # Capacities

    def _modules(self) -> list[tuple[SparseMixture, int]]:
        return [(layer, m) for layer in self._capacities for m in range(layer.configurator.n_modules)]

    def _observe(self, routings: Mapping[str, Routing]) -> None:
        """Learn from a step without a capacity which one is needed."""
        usage: dict[tuple[SparseMixture, int], float] = {}
        for name, routing in routings.items():
            layer = self.work.layer(name)
            if layer in self._capacities:
                shares = (routing.active.sum((0, 1)) / max(1, routing.valid.numel())).tolist()
                for m, share in enumerate(shares):
                    usage[layer, m] = max(share, usage.get((layer, m), 0.0))
        self._note(usage)

    def _note(self, usage: Mapping[tuple[SparseMixture, int], float]) -> None:
        for (layer, _), share in usage.items():
            self._recent[layer] = max(self._recent[layer], share)
        self._since += 1
        wanted = {layer: capacity_for(share) for layer, share in self._recent.items()}
        given = self._capacities
        if any(wanted[layer] > capacity for layer, capacity in given.items() if self._recent[layer] > capacity):
            self._set_capacities({layer: max(capacity, wanted[layer]) for layer, capacity in given.items()})
        elif self._since >= self._window:
            if any(wanted[layer] < capacity / GRID for layer, capacity in given.items()):
                self._set_capacities(wanted)
            self._recent, self._since = dict.fromkeys(self._capacities, 0.0), 0
            self._window = min(2 * self._window, WINDOW)

    def _set_capacities(self, capacities: Mapping[SparseMixture, float]) -> None:
        self._capacities = dict(capacities)
        self._forget()

    def _forget(self) -> None:
        """Drop the captured passes, whose capacities are out of date."""
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
            self._verify_all()  # before the first capture: the tokens of a step may change the capacities
        for signature, part in zip(signatures, parts, strict=True):
            if signature not in self._passes and not self._capture(signature, part):
                return None
        return [self._passes[signature] for signature in signatures]

    def _capture(self, signature: BatchSignature, part: Batch) -> bool:
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

    def _ready(self) -> StepTensors:
        if self._tensors is None:
            self._tensors = StepTensors(self.work, len(self._modules()))
        return self._tensors

    def _capture_passes(self, part: Batch) -> _Passes:
        tensors = self._ready()
        inputs = {name: None if tensor is None else tensor.clone() for name, tensor in part.items()}
        tokens = _tokens(inputs)

        def run() -> PartResult:
            with self._with_capacities(tokens):
                result = self.work.forward_backward(inputs)
            tensors.take(result, [self._usage(result, layer, m) for layer, m in self._modules()])
            return result

        self.work.optimiser.zero_grad()
        self.work.prepare(0, 0)
        self.graphs.rehearse(run)
        tensors.restore()
        replay, result = self.graphs.capture(run)
        return _Passes(inputs, holding(replay, run), result.routings)

    def _capture_update(self) -> Callable[[], None]:
        tensors = self._ready()
        if tensors.skips:
            tensors.report[-1:].fill_(1.0)  # the results of the warm-up are discarded
            self.graphs.rehearse(tensors.update)
            tensors.restore()
        replay, _ = self.graphs.capture(tensors.update)
        return replay

    @contextmanager
    def _with_capacities(self, tokens: int) -> Iterator[None]:
        """Set the capacities of the layers, by half a row less, so that rounding up gives whole blocks of rows."""
        try:
            for layer, capacity in self._capacities.items():
                rows = min(tokens, 64 * math.ceil(capacity * tokens / 64))
                layer.with_capacity((rows - 0.5) / tokens)
            yield
        finally:
            for layer in self._capacities:
                layer.with_capacity(None)

    def _usage(self, result: PartResult, layer: SparseMixture, m: int) -> tuple[Tensor, Tensor]:
        """The share of active tokens, dropped ones included, and how many were dropped for lack of capacity."""
        shares, overflows = [], []
        for name, routing in result.routings.items():
            if self.work.layer(name) is layer:
                assert routing.overflow is not None
                wanted = routing.active[..., m].sum() + routing.overflow[m]
                shares.append(wanted / routing.valid.numel())
                overflows.append(routing.overflow[m])
        return torch.stack(shares).amax(), torch.stack(overflows).amax()

    def _without_automatic(self, routings: Mapping[str, Routing]) -> dict[str, Routing]:
        """The routings, without the overflow, always zero, of layers whose capacity was chosen here."""
        return {
            name: replace(routing, overflow=None) if self.work.layer(name) in self._capacities else routing
            for name, routing in routings.items()
        }


def _signature(part: Batch) -> BatchSignature:
    return tuple(
        None if tensor is None else (name, tuple(tensor.shape), tensor.dtype) for name, tensor in sorted(part.items())
    )


def _tokens(part: Batch) -> int:
    """How many tokens each layer sees in a part; those of one tower, where there are two."""
    inputs = part.get("tokens") if part.get("tokens") is not None else part.get("values")
    assert inputs is not None
    return inputs.shape[0] * inputs.shape[-1]
