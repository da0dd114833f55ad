"""How work that is queued for a device is captured and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from sma.runtime.cuda_graphs import capturing, waiting_forbidden


class Graphs(Protocol):
    """A way to capture what is queued for a device. Tests have one for the CPU, which runs the function again."""

    def rehearse(self, work: Callable[[], Any]) -> None:
        """Run ``work`` as it will be captured; raises RuntimeError if it synchronises with the device."""

    def capture(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """A function that runs the work again on the same tensors, and the result of the captured call."""


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


def holding(replay: Callable[[], None], run: Callable[[], Any]) -> Callable[[], None]:
    """``replay``, which holds addresses only; the tensors at these addresses are kept alive."""

    def replayed(_run: Callable[[], Any] = run) -> None:
        replay()

    return replayed
