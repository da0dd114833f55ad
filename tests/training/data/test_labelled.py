"""Subsets of samples with a class each."""

from __future__ import annotations

import pytest

from sma_models.training.data.labelled import set_aside
from tests.training.data.test_batching import token_dataset


def test_subsets_of_subsets() -> None:
    rest, part = set_aside(token_dataset(20), 0.5, 0)
    assert part is not None
    again, third = set_aside(part, 0.3, 1)
    assert third is not None
    assert sorted([*rest._index, *again._index, *third._index]) == list(range(20))
    assert third[0]["label"] == third._index[0] % 3
    with pytest.raises(IndexError):
        third[3]
