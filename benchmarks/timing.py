"""Time several things side by side, and summarise the times."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

ROUND_SECONDS = 0.1
"""The minimum duration of a round: short runs are repeated in a row, and the time is divided. In shorter bursts a
device runs at a clock that it cannot sustain in training.
"""
MOST_REPEATS = 1000


class Clock:
    """Seconds, read after synchronising with a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> float:
        """Synchronise with the device, then read the clock."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def repeats(run: Callable[[], None], clock: Clock) -> int:
    """How often to run in a row for a round of :data:`ROUND_SECONDS`."""
    start = clock.now()
    run()
    return max(1, min(MOST_REPEATS, int(ROUND_SECONDS / max(clock.now() - start, 1e-6))))


def interleave(
    runs: Mapping[str, Callable[[], None]], rounds: int, clock: Clock
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time everything once a round, A B C A B C ..., so that a device that slows down slows everything alike.

    Args:
        runs: what to time, already warm.
        rounds: how often.
        clock: tells the time.

    Returns:
        Milliseconds of every round by name, and the error of whatever failed (it is left out from then on).
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    errors: dict[str, str] = {}
    often: dict[str, int] = {}
    for _ in range(rounds):
        for name, run in runs.items():
            if name in errors:
                continue
            try:
                often[name] = often.get(name) or repeats(run, clock)
                start = clock.now()
                for _ in range(often[name]):
                    run()
                times[name].append(1e3 * (clock.now() - start) / often[name])
            except Exception as error:
                errors[name] = describe(error)
    return {name: times[name] for name in runs if name not in errors}, errors


def describe(error: BaseException) -> str:
    """One line for an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of several times."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(times: Sequence[float] | None) -> Spread | None:
        """None where nothing was measured."""
        return Spread(statistics.median(times), min(times), max(times)) if times else None


def times_as_fast(times: Sequence[float] | None, baseline: Sequence[float] | None) -> float | None:
    """How many times as fast as the baseline, by the medians; None where one of them is missing."""
    mine, other = Spread.of(times), Spread.of(baseline)
    return other.median / mine.median if mine and other else None


def crossing(points: Sequence[tuple[float, float]]) -> float | None:
    """Where ``ratio`` first passes 1 in points ``(x, ratio)`` with ascending x, on the line between the neighbours.

    None where it stays on one side.
    """
    for (x, ratio), (next_x, next_ratio) in pairwise(points):
        if (ratio - 1) * (next_ratio - 1) <= 0 and ratio != next_ratio:
            return x + (next_x - x) * (1 - ratio) / (next_ratio - ratio)
    return None
