"""Measure one workload: check every row, build it, warm it up, note its memory, then time all rows in turns."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch

from benchmarks import gate
from benchmarks.results import ROOT, Result
from benchmarks.rows import Row
from benchmarks.subjects import Setting, Subject
from benchmarks.timing import Clock, describe, interleave

WARM_UP = 2


def measure(name: str, rows: Sequence[Row], setting: Setting, rounds: int, clock: Clock) -> list[Result]:
    """Results of every row, in the order of the rows; a row that fails says why and the others go on.

    All rows are alive together, weights and gradients, so that their rounds can take turns.
    """
    results = {row.label: Result(name, row.label) for row in rows}
    subjects: dict[str, Subject] = {}
    for row in rows:
        try:
            subjects[row.label] = _prepare(row, setting, results[row.label])
        except Exception as error:
            results[row.label].error = _reason(error)
        _free()
    train = {label: subject.train for label, subject in subjects.items() if subject.train is not None}
    for label, times in _rounds(train, rounds, clock, results).items():
        results[label].train_ms = times
    alive = {label: subject for label, subject in subjects.items() if results[label].error is None}
    for label, subject in list(alive.items()):
        try:
            _evaluate(subject)
        except Exception as error:
            results[label].error = _reason(error)
            del alive[label]
    forward = {label: subject.forward for label, subject in alive.items()}
    for label, times in _rounds(forward, rounds, clock, results).items():
        results[label].forward_ms = times
    return list(results.values())


def _reason(error: Exception) -> str:
    """One line without the folders of this machine; what is not available says so itself."""
    line = str(error) if str(error).startswith("not ") else describe(error)
    return line.replace(f"{ROOT}/", "")


def _rounds(
    runs: Mapping[str, Callable[[], None]], rounds: int, clock: Clock, results: Mapping[str, Result]
) -> dict[str, list[float]]:
    times, errors = interleave(runs, rounds, clock)
    for label, error in errors.items():
        results[label].error = error
    _free()
    return times


def _prepare(row: Row, setting: Setting, result: Result) -> Subject:
    """A warm subject.

    Raises:
        RuntimeError: its small case is wrong, or it is not available.
    """
    if row.check is not None:
        wrong = gate.check(row.check(setting), setting)
        if wrong:
            raise RuntimeError(f"not timed, its results are wrong: {wrong}")
    torch.manual_seed(0)
    before = _allocated(setting)
    with gate.recorded(result.backends):
        subject = row.build(setting)
        run = subject.train or subject.forward
        for _ in range(WARM_UP):
            run()
    if setting.device.type == "cuda":
        result.waits = _waits(run)
        if subject.peak is None:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            run()
            torch.cuda.synchronize()
            subject.peak = torch.cuda.max_memory_allocated()
        result.train_mib = (subject.peak - before) / 2**20
    result.share = subject.share
    result.overflow = getattr(subject.module, "overflow", 0)
    result.parameters = subject.parameters
    return subject


def _waits(run: Callable[[], None]) -> int:
    """How often the host synchronises with the device; PyTorch detects all of its own operations that do."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(each.message) for each in seen)


def _evaluate(subject: Subject) -> None:
    """Ready for the forward pass: without dropout the share of active tokens is another, so it is settled again."""
    subject.module.eval()
    if subject.settle is not None:
        subject.settle()
    for _ in range(WARM_UP):
        subject.forward()


def _allocated(setting: Setting) -> int:
    return torch.cuda.memory_allocated() if setting.device.type == "cuda" else 0


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
