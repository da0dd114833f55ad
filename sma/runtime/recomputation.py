"""Tensors that are not kept for the backward pass but computed again when it asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sma.runtime.checkpointing import DEPTH


class _Recomputed:
    """Hooks that replace some tensors by their numbers, and compute all of them again at the first one asked for."""

    def __init__(self, compute: Callable[[], Sequence[Tensor]], outputs: Sequence[Tensor]) -> None:
        self.compute = compute
        self.numbers = {(out.data_ptr(), out.numel()): i for i, out in enumerate(outputs) if out.numel()}
        self.again: dict[int, Tensor] = {}

    def pack(self, tensor: Tensor) -> Any:
        number = self.numbers.get((tensor.data_ptr(), tensor.numel()))
        return tensor if number is None else (number, tensor.shape)

    def unpack(self, saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        number, shape = saved
        if number not in self.again:
            with torch.no_grad():
                self.again = dict(enumerate(self.compute()))
        return self.again.pop(number).view(shape)


def recomputed(compute: Callable[[], Sequence[Tensor]], outputs: Sequence[Tensor]) -> AbstractContextManager[Any]:
    """What runs inside keeps none of ``outputs`` for its backward pass.

    Meant for tensors that are cheap to compute from something that is kept anyway. On a GPU in training only:
    elsewhere it does nothing, nor under activation checkpointing and in a compiled graph, which recompute themselves.

    Args:
        compute: gives contiguous tensors equal to ``outputs`` once more; it must hold on to nothing else of theirs.
        outputs: contiguous tensors; what runs inside may save them, or views of all their numbers.
    """
    off = not torch.is_grad_enabled() or torch.compiler.is_compiling() or DEPTH.value
    if off or not outputs[0].is_cuda or not all(out.is_contiguous() for out in outputs):
        return nullcontext()
    hooks = _Recomputed(compute, outputs)
    return torch.autograd.graph.saved_tensors_hooks(hooks.pack, hooks.unpack)
