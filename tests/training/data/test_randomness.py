"""Random numbers that never change."""

from __future__ import annotations

import numpy as np

from sma_models.training.data.randomness import ORDER, WINDOW, Draws


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
