"""Things that can be timed: a training step and a forward pass of a model, or of one module."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sma.runtime.cuda_graphs import capturing, waiting_forbidden

LEARNING_RATE = 0.0
"""Adam does all its work, but the weights stay, so that the share of active tokens does too."""


@dataclass(frozen=True)
class Setting:
    """The device, dtype and sizes of a measurement.

    Attributes:
        device: of everything.
        dtype: of the matrix products (autocast), or of a module by itself.
        batch: sequences.
        length: tokens of each.
        layers: bound on the layers of every model, or None; for trying the benchmark out.
        width: bound on the width of single modules, likewise.
        reference: the published standalone SeqBoat, or None.
    """

    device: torch.device
    dtype: torch.dtype
    batch: int = 1
    length: int = 1
    layers: int | None = None
    width: int | None = None
    reference: Path | None = None

    def of(self, batch: int, length: int) -> Setting:
        """The same for a batch of this shape."""
        return replace(self, batch=batch, length=length)

    def small(self) -> Setting:
        """A size at which everything runs in a moment."""
        batch, length = min(self.batch, 2), min(self.length, 96)
        return replace(self, batch=batch, length=length, layers=2, width=32)

    def depth(self, layers: int) -> int:
        """``layers`` within the bound."""
        return min(layers, self.layers or layers)

    def narrow(self, width: int) -> int:
        """``width`` within the bound."""
        return min(width, self.width or width)

    def autocast(self) -> torch.autocast:
        """Mixed precision, where the dtype is a low one."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


@dataclass(frozen=True)
class SyntheticTask:
    """The inputs and targets of a model.

    Attributes:
        vocab: number of tokens; None for real numbers.
        outputs: classes of a sequence, or, for a language model, of every token.
        language: a causal language model.
    """

    vocab: int | None
    outputs: int
    language: bool = False

    def draw(self, setting: Setting) -> tuple[Tensor, Tensor]:
        """Inputs ``(B, L)`` and targets, the same at every call."""
        shape, generator = (setting.batch, setting.length), torch.Generator().manual_seed(0)
        if self.vocab is None:
            inputs = torch.randn(shape, generator=generator)
        else:
            inputs = torch.randint(0, self.vocab - 1, shape, generator=generator)
        targets = inputs.roll(-1, 1).flatten() if self.language else torch.zeros(shape[0], dtype=torch.int64)
        return inputs.to(setting.device), targets.to(setting.device)


Settler = Callable[[Callable[[], None]], float]
"""Given the forward pass, brings the share of active tokens to what was asked for and returns it."""


@dataclass
class Subject:
    """One thing to time.

    Attributes:
        module: to be switched between training and evaluation; its parameters are counted.
        forward: the forward pass, without gradients.
        train: a training step, or the forward and backward pass of a module; None for what only runs forward.
        settle: brings the share of active tokens to what was asked for and returns it; None where nothing is decided.
        share: that was reached in training.
        peak: bytes that were allocated at most while ``train`` was captured as a graph, whose replay allocates nothing.
    """

    module: nn.Module
    forward: Callable[[], None]
    train: Callable[[], None] | None = None
    settle: Callable[[], float] | None = None
    share: float | None = None
    peak: int | None = None

    @property
    def parameters(self) -> int:
        """How many there are."""
        return sum(parameter.numel() for parameter in self.module.parameters())


def model_subject(
    model: nn.Module, task: SyntheticTask, setting: Setting, settler: Settler | None = None, *, graph: bool = False
) -> Subject:
    """Training step (forward, backward, Adam) and forward pass of a model from inputs to logits.

    Args:
        model: on the CPU.
        task: its inputs and targets.
        setting: where and how large.
        settler: moves the share of active tokens of the model.
        graph: capture the training step, and the forward pass, as one CUDA graph each.
    """
    if graph and setting.device.type != "cuda":
        raise RuntimeError("not available: CUDA graphs need a CUDA device")
    model.to(setting.device).train()
    inputs, targets = task.draw(setting)
    optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, fused=True, capturable=graph)

    def step() -> None:
        with setting.autocast():
            loss = F.cross_entropy(model(inputs).float().flatten(0, -2), targets)
        torch.autograd.backward(loss)
        optimiser.step()

    def train() -> None:
        optimiser.zero_grad()
        step()

    @torch.no_grad()
    def forward() -> None:
        with setting.autocast():
            model(inputs)

    settle = None if settler is None else lambda: settler(forward)
    share = settle() if settle is not None else None
    if graph:
        replay, peak = capture(step, optimiser.zero_grad)
        return Subject(model, LazyGraph(forward), replay, settle, share, peak)
    return Subject(model, forward, train, settle, share)


def capture(step: Callable[[], None], clear: Callable[[], None] = lambda: None) -> tuple[Callable[[], None], int]:
    """A CUDA graph of ``step``, and the bytes that were allocated at most while it was captured.

    Args:
        step: does not synchronise with the device, and its shapes do not change.
        clear: drops what ``step`` leaves behind, gradients, so that the graph owns it.

    Raises:
        RuntimeError: ``step`` synchronises with the device. A failed capture would disturb the other measurements.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            clear()
            step()
        clear()
        with waiting_forbidden():
            step()
    torch.cuda.current_stream().wait_stream(side)
    clear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    graph = torch.cuda.CUDAGraph()
    with capturing(graph):
        step()

    def replay(_reads_and_writes: Callable[[], None] = step) -> None:
        # The graph holds addresses only: all tensors of the step must live as long as the graph.
        graph.replay()

    return replay, torch.cuda.max_memory_allocated()


class LazyGraph:
    """Captured at the first call, when the model is in the mode in which it is timed."""

    def __init__(self, step: Callable[[], None]) -> None:
        self.step = step
        self.replay: Callable[[], None] | None = None

    def __call__(self) -> None:
        if self.replay is None:
            self.replay, _ = capture(self.step)
        self.replay()


def module_subject(
    module: nn.Module,
    x: Tensor,
    setting: Setting,
    settler: Settler | None = None,
    *,
    autocast: bool = False,
    graph: bool = False,
) -> Subject:
    """Forward pass, and forward and backward pass to ``x`` and to every parameter, of one module.

    Args:
        module: on its device, from ``x`` to one tensor.
        x: its input.
        setting: where.
        settler: moves its share of active tokens.
        autocast: mixed precision; otherwise the module runs in the dtypes that it and ``x`` have.
        graph: capture the forward and backward pass, and the forward pass, as one CUDA graph each.
    """
    if graph and setting.device.type != "cuda":
        raise RuntimeError("not available: CUDA graphs need a CUDA device")
    x = x.detach().requires_grad_()
    precision = setting.autocast if autocast else nullcontext
    with torch.no_grad(), precision():
        gradient = torch.randn_like(module(x))

    def clear() -> None:
        x.grad = None
        module.zero_grad()

    def step() -> None:
        with precision():
            y = module(x)
        torch.autograd.backward(y, gradient)

    def train() -> None:
        clear()
        step()

    @torch.no_grad()
    def forward() -> None:
        with precision():
            module(x)

    settle = None if settler is None else lambda: settler(forward)
    share = settle() if settle is not None else None
    module.train()
    if graph:
        replay, peak = capture(step, clear)
        return Subject(module, LazyGraph(forward), replay, settle, share, peak)
    return Subject(module, forward, train, settle, share)
