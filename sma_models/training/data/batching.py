"""Which samples form batch k: a pure function of (seed, k), so that a run can be continued at any batch.

A :class:`BatchPlan` answers that question for every k of the whole run, over all epochs. Nothing is remembered between
batches, so a run that was interrupted after ``k`` batches goes on with exactly the batches it would have seen, whatever
the loader had fetched in advance: build the loader again with ``start=k``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from sma.errors import ConfigError
from sma_models.training.data.batches import Collating
from sma_models.training.data.randomness import ORDER, Draws
from sma_models.training.data.resident import LIMIT, Resident, ResidentBatches


@dataclass(frozen=True)
class PlanState:
    """Where a run stands: ``index`` batches of epoch ``epoch`` have been used, under ``seed``."""

    seed: int
    epoch: int
    index: int

    def as_dict(self) -> dict[str, int]:
        """For a checkpoint."""
        return {"seed": self.seed, "epoch": self.epoch, "index": self.index}


class BatchPlan:
    """The sample numbers of every batch of a run.

    Args:
        size: number of samples, or None for an endless supply (batch k is samples k*B .. k*B + B - 1), as for
            :class:`~sma_models.training.data.language.RandomWindows`.
        batch_size: samples in a batch, on each rank.
        seed: decides the order; every epoch has its own.
        shuffle: False keeps the order of the data set.
        drop_last: leave out the last batch of an epoch if it is smaller than the others.
        rank: this process, of ``world_size``; together the ranks see each sample of an epoch at most once.
        world_size: number of processes that train together.

    Raises:
        ConfigError: a number is out of range, or several ranks would get batches of different sizes.
    """

    def __init__(
        self,
        size: int | None,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle and size is not None
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size
        self._check()
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def _check(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size: must be at least 1, got {self.batch_size!r}")
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank: must be at least 0 and below world_size={self.world_size}, got {self.rank!r}")
        if self.world_size > 1 and not self.drop_last:
            raise ConfigError(
                "drop_last: must be true with several ranks, got False: their batches would differ in size"
            )
        if self.size is not None and self.batches_per_epoch == 0:
            raise ConfigError(
                f"batch_size: {self.world_size} x {self.batch_size} must not exceed the samples, got {self.size}"
            )

    @property
    def batches_per_epoch(self) -> int | None:
        """Batches after which all samples were seen; None for an endless supply."""
        if self.size is None:
            return None
        together = self.batch_size * self.world_size
        return self.size // together if self.drop_last else -(-self.size // together)

    def __getitem__(self, k: int) -> list[int]:
        """The sample numbers of batch ``k`` of the run (all epochs counted through)."""
        if k < 0:
            raise IndexError(f"batch number: must be at least 0, got {k}")
        epoch, index = self._split(k)
        first = (index * self.world_size + self.rank) * self.batch_size
        if self.size is None:
            return list(range(first, first + self.batch_size))
        stop = min(first + self.batch_size, self.size)
        return self._epoch_order(epoch)[first:stop].tolist() if self.shuffle else list(range(first, stop))

    def _split(self, k: int) -> tuple[int, int]:
        return (0, k) if self.batches_per_epoch is None else divmod(k, self.batches_per_epoch)

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        # A cache of the current epoch only; it changes nothing but the speed.
        if self._order is None or self._order[0] != epoch:
            assert self.size is not None
            self._order = (epoch, Draws(self.seed, ORDER, epoch).permutation(self.size))
        return self._order[1]

    def state(self, k: int) -> PlanState:
        """The state after ``k`` batches."""
        epoch, index = self._split(k)
        return PlanState(self.seed, epoch, index)

    def resume(self, state: PlanState) -> int:
        """The number of batches done at ``state``: where to go on.

        Raises:
            ConfigError: the state is of another seed, or lies beyond an epoch of this plan.
        """
        if state.seed != self.seed:
            raise ConfigError(f"seed: must be that of the interrupted run ({state.seed}), got {self.seed}")
        if self.batches_per_epoch is None:
            return state.index
        if not 0 <= state.index < self.batches_per_epoch or state.epoch < 0:
            raise ConfigError(
                f"resume: the epochs of this plan have {self.batches_per_epoch} batches, got {state}; "
                "the data set or the batch size has changed"
            )
        return state.epoch * self.batches_per_epoch + state.index


class PlanSampler(Sampler[list[int]]):
    """The batches ``start`` .. ``stop - 1`` of a plan, as a ``batch_sampler`` for torch's loader.

    Args:
        plan: which samples form which batch.
        start: number of batches that are already done.
        stop: where to end; None means after one epoch for an unshuffled plan with an end, and never otherwise.
    """

    def __init__(self, plan: BatchPlan, start: int = 0, stop: int | None = None) -> None:
        if stop is None and not plan.shuffle:
            stop = plan.batches_per_epoch
        if start < 0 or (stop is not None and stop < start):
            raise ConfigError(f"start: must be at least 0 and at most stop={stop}, got {start}")
        self.plan = plan
        self.start = start
        self.stop = stop

    def __iter__(self) -> Iterator[list[int]]:
        k = self.start
        while self.stop is None or k < self.stop:
            yield self.plan[k]
            k += 1

    def __len__(self) -> int:
        if self.stop is None:
            raise TypeError("an endless sampler has no length; give it a stop")
        return self.stop - self.start


CPU = torch.device("cpu")


@dataclass(frozen=True)
class Source:
    """Where batches are put together.

    Attributes:
        device: where they are used.
        resident: keep the samples on the device; None means on an accelerator, where they are small enough and the data
            set can.
        workers: processes that read in advance, where the samples are not kept on the device.
    """

    device: torch.device = CPU
    resident: bool | None = None
    workers: int = 0

    def keeps(self, dataset: Collating) -> bool:
        """Whether the samples are kept on the device.

        Raises:
            ConfigError: they shall be, and cannot be.
        """
        if isinstance(dataset, Resident):
            # On a CPU both ways take the same time, from the same processor.
            fits = self.device.type != "cpu" and dataset.nbytes <= LIMIT
            return fits if self.resident is None else self.resident
        if self.resident:
            raise ConfigError(
                f"train.resident: must be false or null for {type(dataset).__name__}, whose samples cannot be kept on "
                "the device, got true"
            )
        return False


def loader(
    dataset: Collating,
    plan: BatchPlan,
    *,
    start: int = 0,
    stop: int | None = None,
    source: Source | None = None,
) -> DataLoader[Any] | ResidentBatches:
    """The batches ``start`` .. ``stop - 1`` of ``plan``.

    Args:
        dataset: what the numbers of the plan count.
        plan: which samples form which batch.
        start: number of batches that are already done.
        stop: where to end (see :class:`PlanSampler`).
        source: where they are put together; by default here, by this process. The batches are the same everywhere.

    Raises:
        ConfigError: the data set shall be kept on the device, and cannot be.
    """
    sampler = PlanSampler(plan, start, stop)
    source = source or Source(resident=False)
    if source.keeps(dataset):
        assert isinstance(dataset, Resident)
        return ResidentBatches(dataset.resident(source.device), sampler)
    assert isinstance(dataset, Dataset)
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=dataset.collate,
        num_workers=source.workers,
        pin_memory=source.device.type == "cuda",  # a copy from pageable memory synchronises with the device
    )
