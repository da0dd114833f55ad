"""A function that is captured as a CUDA graph and replayed: a decoding step, a chunk of a prompt, a copy of a state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor

from sma.runtime.cuda_graphs import capturing

T = TypeVar("T")
WARMUP = 2
"""Runs before the capture. In the first, kernels are compiled and libraries set up; the second must need neither."""


class CapturedFunction(Generic[T]):
    """Runs a function without arguments eagerly a few times, then captures it as a CUDA graph and replays the graph.

    The function reads and writes tensors at fixed addresses, and returns tensors that every replay overwrites. A
    function that cannot be captured (it synchronises with the device somewhere) is run eagerly from then on.

    Attributes:
        failure: why the capture failed, None if it did not.
    """

    failure: str | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._runs = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._returned: T | None = None

    @property
    def ready(self) -> bool:
        """Whether the function was captured."""
        return self._graph is not None

    def run(self, function: Callable[[], T]) -> T:
        """One run; the next run overwrites what it returns."""
        with torch.cuda.device(self.device):
            if self._graph is None and self.failure is None and self._runs == WARMUP:
                self._capture(function)
            if self._graph is None:
                self._runs += 1
                return function()
            self._graph.replay()
            return cast("T", self._returned)

    def _capture(self, function: Callable[[], T]) -> None:
        """Record the function without running it."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        try:
            with capturing(graph):
                self._returned = function()
        except RuntimeError as error:
            self.failure = str(error).partition("\n")[0]
            torch.cuda.synchronize(self.device)
        else:
            self._graph = graph


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source into its target, with one launch for each pair of dtypes."""
    pairs: dict[tuple[torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        to, of = pairs.setdefault((target.dtype, source.dtype), ([], []))
        to.append(target)
        of.append(source)
    for to, of in pairs.values():
        torch._foreach_copy_(to, of)
