"""A step, a chunk, or the copy of a state, as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar, cast

import torch
from torch import Tensor

from sma.runtime.cuda_graphs import capturing

T = TypeVar("T")
WARMUP = 2
"""Runs before the capture. In the first, kernels are compiled and libraries set up; the second must need neither."""


class Graph(Generic[T]):
    """Runs a function of no arguments plainly a few times, then captures it and replays what was captured.

    The function reads and writes tensors that stay where they are, and returns tensors that a replay fills anew. One
    that cannot be captured (it waits for the device somewhere) goes on being run plainly.

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
        """One run; what it returns is overwritten by the next."""
        with torch.cuda.device(self.device):
            if self._graph is None and self.failure is None and self._runs == WARMUP:
                self._capture(function)
            if self._graph is None:
                self._runs += 1
                return function()
            self._graph.replay()
            return cast("T", self._returned)

    def _capture(self, function: Callable[[], T]) -> None:
        """Record the function, which does not run meanwhile."""
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


def copy_all(places: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Put each tensor into its place, in a few launches."""
    pairs: dict[tuple[torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for to, tensor in zip(places, tensors, strict=True):
        tos, froms = pairs.setdefault((to.dtype, tensor.dtype), ([], []))
        tos.append(to)
        froms.append(tensor)
    for tos, froms in pairs.values():
        torch._foreach_copy_(tos, froms)
