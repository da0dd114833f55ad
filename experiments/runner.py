"""Runs of the queue, several at a time, each by ``sma train`` in a process of its own, until the time is up."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.plan import ROOT, Entry
from experiments.results import Record, best, load, read_run, save, state

SMA = (sys.executable, "-c", "import sys; from sma_models.cli import main; sys.exit(main())")
"""The command ``sma``, also where the library is not installed."""
GRACE = 30.0
"""Seconds that a run has to save itself in."""


@dataclass(frozen=True)
class Limits:
    """The limits of a call.

    Attributes:
        deadline: by the clock, when runs are asked to save themselves and stop.
        together: runs at a time.
        worth: a run is not started with fewer seconds left.
        clock: seconds.
    """

    deadline: float
    together: int = 1
    worth: float = 45.0
    clock: Callable[[], float] = time.monotonic


@dataclass
class _Job:
    """A run that is going on."""

    entry: Entry
    process: subprocess.Popen[bytes]
    before: Record | None
    started: float


@dataclass
class Runner:
    """Works on entries in their order.

    Args:
        folder: the working folder: ``runs``, ``results`` and ``logs``.
        environment: what goes into every record.
        limits: how much is run.
        say: receives messages.
        root: the folder of the experiments.
        finished: is called after every run that ended.
    """

    folder: Path
    environment: dict[str, Any]
    limits: Limits
    say: Callable[[str], None] = print
    root: Path = ROOT
    finished: Callable[[], None] = lambda: None
    jobs: list[_Job] = field(default_factory=list)
    data: dict[tuple[str, ...], subprocess.Popen[bytes]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def work(self, entries: Sequence[Entry]) -> list[str]:
        """Run the entries until all are done or the time is up; then every run has saved its progress.

        Returns:
            The runs that failed.
        """
        pending = list(entries)
        clock, limits = self.limits.clock, self.limits
        try:
            while (pending or self.jobs) and clock() < limits.deadline:
                self._reap()
                self._prepare(pending[: 2 * limits.together])
                while len(self.jobs) < limits.together and limits.deadline - clock() > limits.worth:
                    entry = next((each for each in pending if self._has_data(each)), None)
                    if entry is None:
                        break
                    pending.remove(entry)
                    self._start(entry)
                if not self.jobs and limits.deadline - clock() <= limits.worth:
                    break
                time.sleep(0.1)
        finally:
            self._stop()
        return self.failures

    # Data: got once, before the first run on them starts

    def _prepare(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            if entry.data not in self.data:
                self.data[entry.data] = self._call(f"data-{len(self.data)}", "data", *entry.arguments)

    def _has_data(self, entry: Entry) -> bool:
        process = self.data.get(entry.data)
        # If this failed, the run itself reports why.
        return process is not None and process.poll() is not None

    # Runs

    def run_folder(self, entry: Entry) -> Path:
        """Where ``sma train`` keeps the run."""
        return self.folder / "runs" / Path(entry.recipe).stem / entry.key

    def _call(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        path = self.folder / "logs" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        threads = str(max(1, (os.cpu_count() or 1) // self.limits.together))
        with open(path, "ab") as log:
            return subprocess.Popen(
                [*SMA, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": threads, **os.environ},
            )

    def _start(self, entry: Entry) -> None:
        folder = self.run_folder(entry)
        before = load(self.folder / "results" / f"{entry.key}.json", entry)
        if (folder / "config.yaml").is_file():
            if before is None:  # no record is kept of this, or the next call would take the folder for that of this run
                self._tell(entry, f"{folder}: must be of the run as it is defined now, got an older one; remove it")
                return
            arguments = ["train", "--resume", str(folder)]
        else:
            arguments = ["train", *entry.arguments, "--runs", str(self.folder / "runs"), "--name", entry.key]
            before = before or {**read_run(entry, folder), **self.environment, "wall_seconds": 0.0}
            save(self.folder / "results", entry, before)
        self.say(f"start {entry.key} ({before['steps'] if before else 0} of {entry.steps} steps done)")
        self.jobs.append(_Job(entry, self._call(entry.key, *arguments), before, time.monotonic()))

    def _reap(self) -> None:
        for job in [each for each in self.jobs if each.process.poll() is not None]:
            self.jobs.remove(job)
            self._note(job, stopped=False)
            self.finished()

    def _note(self, job: _Job, *, stopped: bool) -> None:
        """Record how far a run got."""
        record = {**read_run(job.entry, self.run_folder(job.entry)), **self.environment}
        earlier = job.before["wall_seconds"] if job.before else 0.0
        seconds = time.monotonic() - job.started
        record["wall_seconds"] = round(earlier + seconds, 1)
        if not record["finished"] and not stopped:
            self._fail(job.entry, record, self._last_words(job))
            return
        save(self.folder / "results", job.entry, record)
        what = "done" if record["finished"] else "stopped"
        self.say(f"{what} {job.entry.key}: {record['steps']} of {job.entry.steps} steps, {seconds:.0f} s here")

    def _fail(self, entry: Entry, record: Record, reason: str) -> None:
        save(self.folder / "results", entry, {**record, "failed": reason})
        self._tell(entry, reason)

    def _tell(self, entry: Entry, reason: str) -> None:
        self.failures.append(f"{entry.key}: {reason}")
        self.say(f"FAILED {entry.key}: {reason}")

    def _last_words(self, job: _Job) -> str:
        text = (self.folder / "logs" / f"{job.entry.key}.txt").read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
        return f"exit code {job.process.returncode}: {lines[-1].strip() if lines else 'no output'}"

    def _stop(self) -> None:
        """Let every run save itself, and end those that do not."""
        processes = [*(job.process for job in self.jobs), *self.data.values()]
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        until = time.monotonic() + GRACE
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
            if process.poll() is None:
                process.kill()
                process.wait()
        while self.jobs:
            job = self.jobs.pop()
            self._note(job, stopped=True)


def outstanding(entries: Sequence[Entry], folder: Path, root: Path = ROOT, *, retry: bool = False) -> list[Entry]:
    """The entries that are not done; those that failed are left out unless ``retry``."""
    skipped = ("done",) if retry else ("done", "failed")
    return [entry for entry in entries if state(best(entry, folder, root)) not in skipped]
