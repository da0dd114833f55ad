"""What keeps the host from waiting, and captures from breaking off."""

from __future__ import annotations

import gc
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from sma.runtime.cuda_graphs import capturing

needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


class Cycle:
    """Garbage that only the collector frees."""

    def __init__(self, held: Any = None) -> None:
        self.itself, self.held = self, held


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_during_a_capture(monkeypatch: pytest.MonkeyPatch, enabled: bool) -> None:
    asked: list[dict[str, Any]] = []

    def graph(graph: Any, **options: Any) -> AbstractContextManager[None]:
        asked.append(options)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "graph", graph)
    was = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        gone = weakref.ref(Cycle())
        with capturing(None, pool=(1, 2)):  # type: ignore[arg-type]
            assert gone() is None
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
        with pytest.raises(ZeroDivisionError), capturing(None, pool=(1, 2)):  # type: ignore[arg-type]
            1 / 0  # noqa: B018
        assert gc.isenabled() == enabled
    finally:
        gc.enable() if was else gc.disable()
    assert asked == [{"capture_error_mode": "thread_local", "pool": (1, 2)}] * 2


@needs_a_gpu
def test_an_earlier_graph_may_die_in_the_middle() -> None:
    x, graph = torch.zeros(4, device="cuda"), torch.cuda.CUDAGraph()
    x.add_(1)
    with capturing(graph):
        x.add_(1)
    holder, later = Cycle(graph), torch.cuda.CUDAGraph()
    del graph
    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        with capturing(later):
            del holder
            many = [[] for _ in range(1000)]  # would set the collector off
            x.add_(len(many))
    finally:
        gc.set_threshold(*before)
    later.replay()
    assert x.tolist() == [1001.0] * 4
