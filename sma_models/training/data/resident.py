"""Data sets that are kept on the device, and their batches gathered there.

A small model trains on a batch faster than Python collates it from its samples. Where all samples fit, they are
uploaded once, as bytes. From then on a step uploads only the places of its rows, in one asynchronous copy from pinned
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from sma_models.training.data.batches import Batch

LIMIT = 2**30
"""Data sets of at most so many bytes are kept on the device unless a recipe says otherwise."""

Gather = Callable[[Sequence[int]], Batch]
"""Gives the batch of some samples, by their numbers, on the device."""


@runtime_checkable
class Resident(Protocol):
    """A data set that can be kept on a device."""

    @property
    def nbytes(self) -> int:
        """Bytes that it needs there."""

    def resident(self, device: torch.device) -> Gather:
        """Upload the samples. The batches are those that ``collate`` makes of the same samples, bit for bit."""


class ResidentBatches:
    """Batches in the order of a sampler, from a data set on the device.

    Args:
        gather: gives a batch.
        sampler: the numbers of the samples of each batch.
    """

    def __init__(self, gather: Gather, sampler: Sampler[list[int]]) -> None:
        self.gather = gather
        self.sampler = sampler

    def __iter__(self) -> Iterator[Batch]:
        return map(self.gather, iter(self.sampler))

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]  # a sampler with an end


def upload(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """A copy of the array on the device; it does not synchronise with the device."""
    tensor = torch.from_numpy(np.array(array))  # a copy: what was read from files may not be written to
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Rows:
    """Bytes end to end on a device, from which rows are gathered.

    Args:
        flat: (T,) uint8.
        device: where they are kept.
    """

    def __init__(self, flat: NDArray[np.uint8], device: torch.device) -> None:
        self.flat = upload(flat, device)
        self.device = device

    def window(self, starts: Tensor, width: int) -> Tensor:
        """The bytes ``starts[b]`` .. ``starts[b] + width - 1``, ``(B, width)`` int64; any byte beyond the last one."""
        place = starts[:, None] + torch.arange(width, device=self.device)
        return self.flat[place.clamp_(max=self.flat.numel() - 1)].long()

    def mask(self, lengths: Tensor, width: int) -> Tensor:
        """``(B, width)`` bool: the first ``lengths[b]`` of each row."""
        return torch.arange(width, device=self.device) < lengths[:, None]
