"""Where the host must not wait for the device: in steps without a synchronisation, and while a graph is captured."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def waiting_forbidden() -> Iterator[None]:
    """Waiting for a CUDA device raises RuntimeError inside the ``with`` block, at the operation that waits.

    PyTorch notices what its own operations wait for. Needs a CUDA device.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, **options: Any) -> Iterator[None]:
    """What is queued inside the ``with`` block goes into ``graph``; ``options`` as for :class:`torch.cuda.graph`.

    What would end the capture is kept away from it: the garbage collector, which may free an earlier graph at any time,
    runs before, and what other threads ask of the device is theirs (a thread that pins memory for batches, say).

    Raises:
        RuntimeError: something in the block cannot be captured, as it waits for the device.
    """
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local", **options):
            yield
    finally:
        if enabled:
            gc.enable()
