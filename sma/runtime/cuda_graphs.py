"""Code that must not synchronise with the device: steps that only queue work, and captures of CUDA graphs."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def waiting_forbidden() -> Iterator[None]:
    """Inside the ``with`` block an operation that synchronises with a CUDA device raises RuntimeError.

    PyTorch detects synchronisations of its own operations only. Needs a CUDA device.
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
    """Work that is queued inside the ``with`` block is captured into ``graph``; ``options`` as for
    :class:`torch.cuda.graph`.

    The garbage collector, which may free an earlier graph at any time, runs before the capture, as it would end it.
    Calls of other threads to the device (one that pins memory for batches, say) do not belong to the capture.

    Raises:
        RuntimeError: an operation in the block cannot be captured, because it synchronises with the device.
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
