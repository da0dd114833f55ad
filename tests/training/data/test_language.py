"""The ways of cutting a stream of bytes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from sma.errors import ConfigError, DataError
from sma_models.training.data import language
from sma_models.training.data.batching import BatchPlan, loader
from sma_models.training.data.streams import IGNORE, START, ByteStream


def stream_of(size: int) -> ByteStream:
    content = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8).tobytes()
    return ByteStream.join([("a", content[: size // 3]), ("b", content[size // 3 :])])


def reassemble(batches: list[dict[str, torch.Tensor]]) -> list[int]:
    return [int(target) for batch in batches for target in batch["targets"].flatten() if target != IGNORE]


@pytest.mark.parametrize("size", [1, 7, 64, 65, 200])
def test_chunks_cover_every_byte_once(size: int) -> None:
    stream = stream_of(size)
    chunks = language.Chunks(stream, 16)
    batches = list(loader(chunks, BatchPlan(len(chunks), 3, shuffle=False, drop_last=False)))
    assert reassemble(batches) == stream.data.tolist()
    tokens = [
        int(t)
        for batch in batches
        for t, y in zip(batch["tokens"].flatten(), batch["targets"].flatten(), strict=True)
        if y != IGNORE
    ]
    assert tokens == [START, *stream.data[:-1].tolist()]
    with pytest.raises(IndexError):
        chunks[len(chunks)]


@pytest.mark.parametrize(("size", "lanes"), [(1, 1), (3, 5), (64, 4), (65, 4), (200, 3), (199, 7)])
def test_lanes_go_on_and_cover_every_byte_once(size: int, lanes: int) -> None:
    stream = stream_of(size)
    data = language.Lanes(stream, lanes, 16)
    rows: list[list[int]] = [[] for _ in range(lanes)]
    before = [START] + [None] * (lanes - 1)
    for k in range(len(data)):
        batch = data[k]
        assert batch["tokens"] is not None
        assert batch["targets"] is not None
        for lane in range(lanes):
            targets = [int(y) for y in batch["targets"][lane] if y != IGNORE]
            if targets and rows[lane]:
                assert batch["tokens"][lane, 0] == rows[lane][-1]
            elif targets and before[lane] is not None:
                assert batch["tokens"][lane, 0] == before[lane]
            rows[lane] += targets
            if batch["valid"] is not None:
                assert int(batch["valid"][lane].sum()) == len(targets)
    assert list(itertools.chain.from_iterable(rows)) == stream.data.tolist()


def test_windows_are_parts_of_the_stream() -> None:
    stream = stream_of(300)
    windows = language.RandomWindows(stream, 16, seed=4)
    text = stream.data.tobytes()
    starts = set()
    for index in range(400):
        item = windows[index]
        assert item["tokens"].shape == item["targets"].shape == (16,)
        assert item["tokens"][1:].equal(item["targets"][:-1])
        part = bytes([int(item["tokens"][0]), *item["targets"].tolist()])
        starts.add(text.index(part))
    assert min(starts) == 0
    assert max(starts) == 300 - 17
    assert windows[7]["tokens"].equal(language.RandomWindows(stream, 16, seed=4)[7]["tokens"])
    assert not windows[7]["tokens"].equal(language.RandomWindows(stream, 16, seed=5)[7]["tokens"])
    batches = list(loader(windows, BatchPlan(None, 4), start=2, stop=4))
    assert batches[0]["tokens"][1].equal(windows[9]["tokens"])
    assert batches[0]["valid"] is None


def test_streams_that_are_too_short_are_refused() -> None:
    with pytest.raises(DataError, match="seq_len \\+ 1 = 301 bytes, got 300"):
        language.RandomWindows(stream_of(300), 300)
    assert language.RandomWindows(stream_of(301), 300)[3]["tokens"].shape == (300,)
    with pytest.raises(DataError, match="must hold data"):
        language.Chunks(ByteStream.join([]), 4)
    with pytest.raises(ConfigError, match="seq_len"):
        language.Chunks(stream_of(3), 0)
    with pytest.raises(ConfigError, match="batch_size"):
        language.Lanes(stream_of(3), 0, 4)


def test_documents_keep_their_places_in_a_cut() -> None:
    stream = ByteStream.join([("a", b"xxxx"), ("b", b"yyy"), ("c", b"zz")])
    assert stream.documents == (("a", 0), ("b", 4), ("c", 7))
    part = stream.cut(5, 8)
    assert part.data.tobytes() == b"yyz"
    assert part.documents == (("b", 0), ("c", 2))
