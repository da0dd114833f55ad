"""The arithmetic of the benchmarks, with a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks.shares import settle
from benchmarks.timing import MOST_REPEATS, ROUND_SECONDS, Clock, Spread, crossing, interleave, times_as_fast


class FakeClock(Clock):
    """Stands still until a run moves it."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.seconds = 0.0
        self.log = ""

    def now(self) -> float:
        return self.seconds

    def runs(self, name: str, *seconds: float) -> Callable[[], None]:
        """A run that takes these seconds in turn, the last ones for ever."""
        left = list(seconds)

        def run() -> None:
            self.log += name
            self.seconds += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_rounds_take_turns_and_the_first_run_is_not_counted() -> None:
    clock = FakeClock()
    times, errors = interleave({"a": clock.runs("a", 9.0, 1.0, 2.0), "b": clock.runs("b", 5.0, 4.0)}, 2, clock)
    assert clock.log == "aabbab"  # each runs once more in its first round, to find out how often to repeat it
    assert times == {"a": [1000.0, 2000.0], "b": [4000.0, 4000.0]}
    assert errors == {}


def test_short_runs_are_repeated_and_divided() -> None:
    clock = FakeClock()
    times, _ = interleave({"a": clock.runs("a", ROUND_SECONDS / 4)}, 3, clock)
    assert len(clock.log) == 1 + 3 * 4
    assert times["a"] == pytest.approx([1e3 * ROUND_SECONDS / 4] * 3)
    clock = FakeClock()
    interleave({"a": clock.runs("a", 1e-9)}, 1, clock)
    assert len(clock.log) == 1 + MOST_REPEATS


def test_what_fails_is_left_out_and_the_others_go_on() -> None:
    clock = FakeClock()

    def fail() -> None:
        clock.log += "f"
        raise ValueError("too wide\nand more")

    times, errors = interleave({"f": fail, "a": clock.runs("a", 1.0)}, 3, clock)
    assert times == {"a": [1000.0] * 3}
    assert errors == {"f": "ValueError: too wide"}
    assert clock.log.count("f") == 1


def test_ratios_are_of_medians() -> None:
    assert times_as_fast([1.0, 2.0, 90.0], [6.0, 6.0, 7.0]) == 3.0
    assert times_as_fast(None, [1.0]) is None
    assert times_as_fast([1.0], []) is None
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert Spread.of([]) is None


def test_the_crossing_lies_between_the_neighbours() -> None:
    assert crossing([(0.2, 3.0), (0.5, 1.5), (0.9, 0.5)]) == pytest.approx(0.7)
    assert crossing([(1.0, 0.5), (3.0, 1.5)]) == 2.0
    assert crossing([(1.0, 2.0), (2.0, 1.1)]) is None
    assert crossing([]) is None


@pytest.mark.parametrize("target", [0.02, 0.3, 0.9])
def test_shares_settle_although_layers_depend_on_each_other(target: float) -> None:
    logits = torch.randn(2, 20000) * torch.tensor([[0.01], [3.0]]) + torch.tensor([[0.5], [-2.0]])
    controls = [torch.ones(1), torch.ones(1)]

    def measure() -> list[float]:
        first = (logits[0] + controls[0] > 0).float().mean()
        return [float(first), float((logits[1] + controls[1] + first > 0).float().mean())]

    reached = settle(controls, measure, target)
    assert measure() == pytest.approx([target] * 2, abs=max(0.02 * target, 0.001))
    assert reached == pytest.approx(target, abs=max(0.02 * target, 0.001))


def test_a_share_of_one_activates_everything() -> None:
    control = torch.zeros(1)
    assert settle([control], lambda: [float(control > 100)], 1.0) == 1.0
