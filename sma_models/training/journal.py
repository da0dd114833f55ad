"""The log of a training run, ``metrics.csv``, which can be cut back to a checkpoint and continued."""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger

from sma.errors import CheckpointError
from sma_models.training.run import Run, write_text


class MetricsFile(Logger):
    """A Lightning logger that appends one line per step to a CSV file.

    Numbers are written in full, so equal runs give equal files.

    The first line decides the columns. Each line reaches the disk before the call returns.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._columns = read_columns(path)

    @property
    def name(self) -> str:
        return self.path.parent.name

    @property
    def version(self) -> str:
        return "0"

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the configuration lies beside the file."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a line; values that are not known yet stay empty."""
        row = {"step": step, **metrics}
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if not self._columns:
            self._columns = list(row)
            writer.writerow(self._columns)
        writer.writerow("" if row.get(name) is None else repr(row[name]) for name in self._columns)
        with open(self.path, "a", encoding="ascii", newline="") as file:
            file.write(text.getvalue())


def read_columns(path: Path) -> list[str]:
    """The names in the first line; none when there is no file."""
    if not path.exists():
        return []
    with open(path, encoding="ascii", newline="") as file:
        return next(csv.reader(file), [])


def last_step(path: Path) -> int:
    """The largest step that the file tells of; 0 where there is none."""
    if not path.exists():
        return 0
    firsts = [line.partition(",")[0] for line in path.read_text(encoding="ascii", errors="replace").splitlines()]
    return max((int(first) for first in firsts if first.isascii() and first.isdigit()), default=0)


def check_checkpoint(run: Run, checkpoint_every: int) -> None:
    """Refuse to resume a run that had a checkpoint and has lost it: it would begin anew.

    Raises:
        CheckpointError: it has none, although it went beyond the first one, or the folder of checkpoints is there.
    """
    if run.finished or run.checkpoint.exists():
        return
    folder, step = run.checkpoint.parent, last_step(run.metrics)
    emptied = folder.is_dir() and not any(folder.glob(".*.tmp"))  # one that was being written is no loss
    if step > checkpoint_every or emptied:
        raise CheckpointError(
            f"{run.checkpoint}: must be there to resume a run that got to step {step}, got no such file; "
            f"put it back, or begin anew: sma train {run.path.parent.name} --name NEW"
        )


def set_aside(path: Path) -> None:
    """Move the file to the first free name ``metrics.N.csv``, so that a run that begins anew erases nothing."""
    if last_step(path):
        number = 1
        while (kept := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
            number += 1
        path.rename(kept)


def cut_back(path: Path, step: int) -> None:
    """Drop every line after ``step``, and a last one that was cut off in writing.

    Raises:
        CheckpointError: the file is no table of steps.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="ascii").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    if not whole:
        path.unlink()
        return
    if not whole[0].startswith("step,"):
        raise CheckpointError(f"{path}: must begin with the column 'step', got {whole[0][:40]!r}")
    kept = [line for line in whole[1:] if line.partition(",")[0].isdigit() and int(line.partition(",")[0]) <= step]
    write_text(path, "".join([whole[0], *kept]))


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of the file; empty fields are left out."""
    with open(path, encoding="ascii", newline="") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
