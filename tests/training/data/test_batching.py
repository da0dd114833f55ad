"""Which samples form batch k."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sma.errors import ConfigError
from sma_models.training.data.batching import BatchPlan, PlanSampler, PlanState, loader
from sma_models.training.data.labelled import Ragged, TokenDataset


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
