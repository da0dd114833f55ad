"""Which samples form batch k, and the ways of cutting a stream of bytes."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sma.errors import ConfigError, DataError
from sma_models.training.data import lm
from sma_models.training.data.batching import BatchPlan, PlanSampler, PlanState, loader
from sma_models.training.data.datasets import Ragged, TokenDataset, set_aside
from sma_models.training.data.randomness import ORDER, WINDOW, Draws


def stream_of(size: int) -> lm.ByteStream:
    content = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8).tobytes()
    return lm.ByteStream.join([("a", content[: size // 3]), ("b", content[size // 3 :])])


def token_dataset(size: int) -> TokenDataset:
    return TokenDataset(Ragged.join(bytes(range(1 + i % 5)) for i in range(size)), [i % 3 for i in range(size)], 3, 256)


@given(size=st.integers(1, 50), batch_size=st.integers(1, 12), seed=st.integers(0, 2**63 - 1), drop=st.booleans())
def test_an_epoch_has_each_sample_at_most_once(size: int, batch_size: int, seed: int, drop: bool) -> None:
    if drop and batch_size > size:
        with pytest.raises(ConfigError, match="batch_size"):
            BatchPlan(size, batch_size, seed=seed, drop_last=drop)
        return
    plan = BatchPlan(size, batch_size, seed=seed, drop_last=drop)
    count = plan.batches_per_epoch
    assert count is not None
    for epoch in range(2):
        seen = Counter(itertools.chain.from_iterable(plan[k] for k in range(epoch * count, (epoch + 1) * count)))
        assert set(seen.values()) == {1}
        assert len(seen) == (size // batch_size * batch_size if drop else size)


@given(k=st.integers(0, 40), start=st.integers(0, 40), seed=st.integers(0, 5))
def test_a_batch_is_a_function_of_seed_and_number(k: int, start: int, seed: int) -> None:
    used = BatchPlan(17, 4, seed=seed)
    for earlier in range(start):
        used[earlier]
    assert used[k] == BatchPlan(17, 4, seed=seed)[k]


def test_epochs_and_seeds_differ() -> None:
    plan = BatchPlan(100, 100)
    assert plan[0] != plan[1]
    assert plan[0] != BatchPlan(100, 100, seed=1)[0]
    assert BatchPlan(5, 2, shuffle=False, drop_last=False)[2] == [4]


def test_an_interrupted_run_goes_on_with_the_same_batches() -> None:
    dataset = token_dataset(23)
    plan = BatchPlan(len(dataset), 4, seed=7)
    whole = list(loader(dataset, plan, stop=14))
    state = PlanState(**plan.state(9).as_dict())
    assert state == PlanState(seed=7, epoch=1, index=4)
    again = BatchPlan(len(dataset), 4, seed=7)
    rest = list(loader(dataset, again, start=again.resume(state), stop=14))
    assert len(whole) == 14
    assert len(rest) == 5
    for left, right in zip(whole[9:], rest, strict=True):
        assert left["tokens"].equal(right["tokens"])
        assert left["label"].equal(right["label"])


def test_a_state_that_does_not_fit_is_refused() -> None:
    plan = BatchPlan(23, 4, seed=7)
    with pytest.raises(ConfigError, match="seed: must be that of the interrupted run"):
        plan.resume(PlanState(seed=8, epoch=0, index=0))
    with pytest.raises(ConfigError, match="the epochs of this plan have 5 batches"):
        plan.resume(PlanState(seed=7, epoch=0, index=5))
    endless = BatchPlan(None, 4, seed=7)
    assert endless.resume(endless.state(1234)) == 1234


def test_ranks_share_an_epoch() -> None:
    plans = [BatchPlan(26, 4, seed=3, rank=rank, world_size=3) for rank in range(3)]
    seen = [index for plan in plans for k in range(2) for index in plan[k]]
    assert plans[0].batches_per_epoch == 2
    assert len(set(seen)) == len(seen) == 24
    alone = BatchPlan(26, 12, seed=3)
    assert sorted(alone[0]) == sorted(index for plan in plans for index in plan[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 3, "batch_size": 0}, "batch_size: must be at least 1"),
        ({"size": 3, "batch_size": 4}, "batch_size: 1 x 4 must not exceed the samples, got 3"),
        ({"size": 0, "batch_size": 1, "drop_last": False}, "must not exceed the samples, got 0"),
        ({"size": 9, "batch_size": 1, "rank": 2, "world_size": 2}, "rank: must be"),
        ({"size": 9, "batch_size": 1, "world_size": 2, "drop_last": False}, "drop_last: must be true"),
        ({"size": 9, "batch_size": 1, "seed": -1}, "seed: must be at least 0"),
    ],
)
def test_bad_plans_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BatchPlan(**options)[0]  # type: ignore[arg-type]


def test_a_sampler_ends_where_it_should() -> None:
    evaluation = PlanSampler(BatchPlan(10, 4, shuffle=False, drop_last=False))
    assert list(evaluation) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(evaluation) == 3
    endless = PlanSampler(BatchPlan(10, 4))
    assert len(list(itertools.islice(endless, 50))) == 50
    with pytest.raises(TypeError, match="no length"):
        len(endless)
    with pytest.raises(ConfigError, match="start"):
        PlanSampler(BatchPlan(10, 4), start=3, stop=2)


def test_random_numbers_never_change() -> None:
    """Philox is specified; should numpy ever change it, every published split and order would change with it."""
    assert Draws(0, ORDER, 0).permutation(8).tolist() == EXPECTED_ORDER
    assert Draws(2**63 - 1, WINDOW, 2**40).below(1000, 4).tolist() == EXPECTED_NUMBERS


EXPECTED_ORDER = [5, 3, 7, 2, 4, 1, 0, 6]
EXPECTED_NUMBERS = [459, 850, 601, 403]


def test_draws_are_uniform_and_purposes_independent() -> None:
    numbers = Draws(5, ORDER).uniform(20000)
    assert 0.0 <= numbers.min() < numbers.max() < 1.0
    assert abs(numbers.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(numbers, Draws(5, WINDOW).uniform(20000))[0, 1]) < 0.03
    assert abs(np.corrcoef(numbers, Draws(5, ORDER, 1).uniform(20000))[0, 1]) < 0.03


def test_subsets_of_subsets() -> None:
    rest, part = set_aside(token_dataset(20), 0.5, 0)
    assert part is not None
    again, third = set_aside(part, 0.3, 1)
    assert third is not None
    assert sorted([*rest._index, *again._index, *third._index]) == list(range(20))
    assert third[0]["label"] == third._index[0] % 3
    with pytest.raises(IndexError):
        third[3]


def reassemble(batches: list[dict[str, torch.Tensor]]) -> list[int]:
    return [int(target) for batch in batches for target in batch["targets"].flatten() if target != lm.IGNORE]


@pytest.mark.parametrize("size", [1, 7, 64, 65, 200])
def test_chunks_cover_every_byte_once(size: int) -> None:
    stream = stream_of(size)
    chunks = lm.Chunks(stream, 16)
    batches = list(loader(chunks, BatchPlan(len(chunks), 3, shuffle=False, drop_last=False)))
    assert reassemble(batches) == stream.data.tolist()
    tokens = [
        int(t)
        for batch in batches
        for t, y in zip(batch["tokens"].flatten(), batch["targets"].flatten(), strict=True)
        if y != lm.IGNORE
    ]
    assert tokens == [lm.START, *stream.data[:-1].tolist()]
    with pytest.raises(IndexError):
        chunks[len(chunks)]


@pytest.mark.parametrize(("size", "lanes"), [(1, 1), (3, 5), (64, 4), (65, 4), (200, 3), (199, 7)])
def test_lanes_go_on_and_cover_every_byte_once(size: int, lanes: int) -> None:
    stream = stream_of(size)
    data = lm.Lanes(stream, lanes, 16)
    rows: list[list[int]] = [[] for _ in range(lanes)]
    before = [lm.START] + [None] * (lanes - 1)
    for k in range(len(data)):
        batch = data[k]
        assert batch["tokens"] is not None
        assert batch["targets"] is not None
        for lane in range(lanes):
            targets = [int(y) for y in batch["targets"][lane] if y != lm.IGNORE]
            if targets and rows[lane]:
                assert batch["tokens"][lane, 0] == rows[lane][-1]
            elif targets and before[lane] is not None:
                assert batch["tokens"][lane, 0] == before[lane]
            rows[lane] += targets
            if batch["valid"] is not None:
                assert int(batch["valid"][lane].sum()) == len(targets)
    assert list(itertools.chain.from_iterable(rows)) == stream.data.tolist()


def test_windows_are_pieces_of_the_stream() -> None:
    stream = stream_of(300)
    windows = lm.RandomWindows(stream, 16, seed=4)
    text = stream.data.tobytes()
    starts = set()
    for index in range(400):
        item = windows[index]
        assert item["tokens"].shape == item["targets"].shape == (16,)
        assert item["tokens"][1:].equal(item["targets"][:-1])
        piece = bytes([int(item["tokens"][0]), *item["targets"].tolist()])
        starts.add(text.index(piece))
    assert min(starts) == 0
    assert max(starts) == 300 - 17
    assert windows[7]["tokens"].equal(lm.RandomWindows(stream, 16, seed=4)[7]["tokens"])
    assert not windows[7]["tokens"].equal(lm.RandomWindows(stream, 16, seed=5)[7]["tokens"])
    batches = list(loader(windows, BatchPlan(None, 4), start=2, stop=4))
    assert batches[0]["tokens"][1].equal(windows[9]["tokens"])
    assert batches[0]["valid"] is None


def test_streams_that_are_too_short_are_refused() -> None:
    with pytest.raises(DataError, match="seq_len \\+ 1 = 301 bytes, got 300"):
        lm.RandomWindows(stream_of(300), 300)
    assert lm.RandomWindows(stream_of(301), 300)[3]["tokens"].shape == (300,)
    with pytest.raises(DataError, match="must hold data"):
        lm.Chunks(lm.ByteStream.join([]), 4)
    with pytest.raises(ConfigError, match="seq_len"):
        lm.Chunks(stream_of(3), 0)
    with pytest.raises(ConfigError, match="batch_size"):
        lm.Lanes(stream_of(3), 0, 4)


def test_documents_keep_their_places_in_a_cut() -> None:
    stream = lm.ByteStream.join([("a", b"xxxx"), ("b", b"yyy"), ("c", b"zz")])
    assert stream.documents == (("a", 0), ("b", 4), ("c", 7))
    part = stream.cut(5, 8)
    assert part.data.tobytes() == b"yyz"
    assert part.documents == (("b", 0), ("c", 2))


def test_files_are_split_at_bytes_or_between_files(tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"{number:02}.txt").write_bytes(bytes([number]) * 10)
    splits = lm.load([tmp_path / "*.txt"], fractions=(0.1, 0.2))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (420, 60, 120)
    joined = b"".join(part.data.tobytes() for part in (splits.train, splits.validation, splits.test))
    assert joined == b"".join(bytes([number]) * 10 for number in range(60))

    by_file = lm.load([tmp_path], split="files", fractions=(0.2, 0.2))
    names = [{name for name, _ in part.documents} for part in (by_file.train, by_file.validation, by_file.test)]
    assert sum(map(len, names)) == len(set.union(*names)) == 60
    assert min(map(len, names)) >= 4
    (tmp_path / "00a.txt").write_bytes(b"new")
    later = lm.load([tmp_path], split="files", fractions=(0.2, 0.2))
    assert names[2] <= {name for name, _ in later.test.documents}


@pytest.mark.parametrize(
    ("fractions", "split", "message"),
    [((0.0, 0.1), "bytes", "fractions"), ((0.5, 0.5), "files", "fractions"), ((0.1, 0.1), "lines", "split: must be")],
)
def test_bad_splits_are_refused(tmp_path: Path, fractions: tuple[float, float], split: str, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc" * 100)
    with pytest.raises(ConfigError, match=message):
        lm.load([tmp_path], split=split, fractions=fractions)  # type: ignore[arg-type]


def test_files_without_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\*\.txt: must name at least one file, got none"):
        lm.load([tmp_path / "*.txt"])
    with pytest.raises(DataError, match="at least one file, got an empty list"):
        lm.load([])
    (tmp_path / "a.txt").write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.txt: must hold data, got an empty file"):
        lm.load([tmp_path])
    with pytest.raises(DataError, match="train split: must hold data"):
        lm.load([tmp_path], split="files")
    (tmp_path / "a.txt").write_bytes(b"abc")
    with pytest.raises(DataError, match="validation split: must hold data"):
        lm.load([tmp_path])


def test_the_standard_library_is_split_by_file() -> None:
    splits = lm.load_stdlib()
    parts = {
        name: {document for document, _ in getattr(splits, name).documents} for name in ("train", "validation", "test")
    }
    assert not parts["train"] & parts["test"]
    assert not parts["validation"] & (parts["train"] | parts["test"])
    everything = set.union(*parts.values())
    assert {"os.py", "json/decoder.py", "asyncio/tasks.py"} <= everything
    folders = {folder for name in everything for folder in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "site-packages", "encodings", "__pycache__"}
    sizes = {name: len(getattr(splits, name)) for name in parts}
    assert sum(sizes.values()) > 5_000_000
    assert 0.01 < sizes["validation"] / sum(sizes.values()) < 0.12
    assert 0.01 < sizes["test"] / sum(sizes.values()) < 0.12
    again = lm.load_stdlib()
    assert (again.test.data == splits.test.data).all()
    assert again.test.documents == splits.test.documents
    first = splits.test.documents[0][0]
    assert (Path(sys.modules["os"].__file__ or "").parent / first).read_bytes()[:50] == splits.test.data[:50].tobytes()


def test_a_folder_without_source_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must contain the source files of the Python standard library"):
        lm.load_stdlib(root=tmp_path)


def test_enwik8_must_have_its_published_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "enwik8").mkdir()
    (tmp_path / "enwik8/enwik8").write_bytes(bytes(range(100)))
    with pytest.raises(DataError, match="enwik8: must have 100000000 bytes, got 100"):
        lm.load_enwik8(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="must contain 'enwik8'"):
        lm.load_enwik8(tmp_path / "empty")
    monkeypatch.setattr(lm, "ENWIK8_SIZES", (90, 5, 5))
    for root in (tmp_path, tmp_path / "enwik8", tmp_path / "enwik8/enwik8"):
        splits = lm.load_enwik8(root)
        assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [90, 5, 5]
        assert splits.test.data.tolist() == list(range(95, 100))
