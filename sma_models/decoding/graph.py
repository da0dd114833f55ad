"""A step as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sma.stepping import Decision

WARMUP = 2
"""Runs before the capture: kernels are compiled and libraries set up in the first, and the second must need neither."""


class Graph:
    """Runs a function of no arguments plainly a few times, then captures it and replays what was captured.

    The function reads and writes tensors that stay where they are, and returns tensors that a replay fills anew.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._runs = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._returned: dict[str, Decision] = {}

    @property
    def ready(self) -> bool:
        """Whether the function was captured."""
        return self._graph is not None

    def run(self, function: Callable[[], dict[str, Decision]]) -> dict[str, Decision]:
        """One run; what it returns is overwritten by the next."""
        with torch.cuda.device(self.device):
            if self._graph is None and self._runs < WARMUP:
                self._runs += 1
                return function()
            if self._graph is None:
                graph = torch.cuda.CUDAGraph()
                torch.cuda.synchronize(self.device)
                with torch.cuda.graph(graph):
                    self._returned = function()
                self._graph = graph
            self._graph.replay()
            return self._returned
