"""Batches gathered on the device are those that are put together from samples, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sma.errors import ConfigError, SpecError
from sma_models.training.data.batching import BatchPlan, Source, loader
from sma_models.training.data.labelled import PairDataset, PixelDataset, Ragged, TokenDataset
from sma_models.training.data.language import Chunks, RandomWindows
from sma_models.training.data.resident import LIMIT, ResidentBatches
from sma_models.training.data.streams import ByteStream
from sma_models.training.loop import open_task
from sma_models.training.recipe import load_recipe

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RNG = np.random.default_rng(0)
ROWS = Ragged.join(RNG.integers(0, 256, n, dtype=np.uint8).tobytes() for n in (5, 9, 1, 9, 7, 9, 3, 9, 9, 2, 8, 30))
LABELS = RNG.integers(0, 4, len(ROWS))
STREAM = ByteStream.join([("a", RNG.integers(0, 256, 50, dtype=np.uint8).tobytes())])


def tokens(pad_to: int = 1) -> TokenDataset:
    return TokenDataset(ROWS, LABELS, 4, pad=256).padded_to(pad_to).subset([0, 1, 3, 5, 7, 8, 9, 2, 6, 11, 4])


def pairs(pad_to: int = 1) -> PairDataset:
    both = [(n, len(ROWS) - 1 - n) for n in range(len(ROWS))]
    return PairDataset(ROWS, both, LABELS, 4, pad=256).padded_to(pad_to).subset(range(1, 12))


def pixels() -> PixelDataset:
    return PixelDataset(RNG.integers(0, 256, (9, 4, 4), dtype=np.uint8), LABELS[:9], 4, 0.48, 0.24).subset(range(2, 9))


SETS: dict[str, Callable[[], Any]] = {
    "tokens": tokens,
    "tokens in few shapes": lambda: tokens(4),
    "pairs": pairs,
    "pairs in few shapes": lambda: pairs(7),
    "pixels": pixels,
    "windows": lambda: RandomWindows(STREAM, 8, seed=3),
    "chunks": lambda: Chunks(STREAM, 8),
    "one long chunk": lambda: Chunks(STREAM, 80),
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("shuffle", [True, False])
def test_resident_batches_are_the_collated_ones(name: str, shuffle: bool) -> None:
    dataset = SETS[name]()
    endless = isinstance(dataset, RandomWindows)
    plan = BatchPlan(None if endless else len(dataset), min(3, len(dataset)), shuffle=shuffle, drop_last=False)
    stop = 7 if endless or shuffle else None
    collated = loader(dataset, plan, start=1 if stop else 0, stop=stop, source=Source(resident=False))
    gathered = loader(dataset, plan, start=1 if stop else 0, stop=stop, source=Source(DEVICE, resident=True))
    assert isinstance(gathered, ResidentBatches)
    assert len(gathered) == len(collated) >= 1
    for ours, theirs in zip(gathered, collated, strict=True):
        assert ours.keys() == theirs.keys()
        for key, expected in theirs.items():
            found = ours[key]
            assert (found is None) == (expected is None), key
            if found is not None:
                assert found.dtype == expected.dtype, key
                assert found.device.type == DEVICE.type
                assert torch.equal(found.cpu(), expected), key


@pytest.mark.parametrize("make", [tokens, pairs])
def test_lengths_say_what_the_mask_says(make: Callable[[], Any]) -> None:
    dataset = make()
    batch = dataset.collate([dataset[n] for n in range(4)])
    assert torch.equal(batch["lengths"], batch["valid"].sum(-1))
    assert bool((batch["valid"].int().diff(dim=-1) <= 0).all()), "the padding is on the right"


def test_few_shapes() -> None:
    """Widths are multiples, except that no batch is longer than the longest sample of all."""
    widths = {
        multiple: [
            tokens(multiple).collate([tokens(multiple)[n]])["tokens"].shape[1]  # type: ignore[union-attr]
            for n in (0, 1, 9)
        ]
        for multiple in (1, 4, 16, 1000)
    }
    assert widths == {1: [5, 9, 30], 4: [8, 12, 30], 16: [16, 16, 30], 1000: [30, 30, 30]}
    full = tokens(4).collate([tokens(4)[1]])
    assert full["lengths"] is not None, "padded to 12, so 9 is no longer the whole row"
    assert full["lengths"].tolist() == [9]
    with pytest.raises(ConfigError, match="pad_to: must be at least 1, got 0"):
        tokens(0)


def test_what_is_kept_on_the_device() -> None:
    small = tokens()
    large = PixelDataset(
        np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (LIMIT + 1, 1), (0, 0)), LABELS, 4, 0, 1
    )
    gpu = torch.device("cuda")
    assert Source(gpu).keeps(small)
    assert not Source(gpu, resident=False).keeps(small)
    assert not Source(gpu).keeps(large)
    assert Source(gpu, resident=True).keeps(large)
    assert not Source().keeps(small), "on a CPU there is nothing to gain"
    assert Source(resident=True).keeps(small)


def test_what_cannot_be_kept_on_the_device(speech_root: Path) -> None:
    changes = (f"data.root={speech_root}", "data.classes=[no,yes]", "data.length=400", "model.n_classes=2")
    recipe = load_recipe("speech", *changes, "train.resident=true")
    train = open_task(recipe).train
    assert not Source(torch.device("cuda")).keeps(train)
    with pytest.raises(ConfigError, match=r"train.resident: must be false or null for Recordings, .* got true"):
        loader(train, BatchPlan(2, 1), source=recipe.train.source(DEVICE))


def test_a_bad_multiple_is_refused() -> None:
    with pytest.raises(SpecError, match="pad_to: must be at least 1, got 0"):
        load_recipe("text", "data.pad_to=0")
