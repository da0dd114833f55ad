"""Metrics of a training run, as its CSV log keeps them."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sma.errors import DataError

Rows = Sequence[Mapping[str, Any]]
Curve = tuple[list[float], list[float]]
"""Steps and values."""


def read_metrics(metrics: str | Path | Rows) -> Rows:
    """The rows of a ``metrics.csv``, or rows as they are.

    Raises:
        DataError: the file is missing, not text, or has no header.
    """
    if not isinstance(metrics, str | Path):
        return metrics
    try:
        with open(metrics, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames
            rows = list(reader)
    except OSError as error:
        raise DataError(f"{metrics}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{metrics}: must be a CSV file in UTF-8: {error}") from error
    if header is None:
        raise DataError(f"{metrics}: must have a header, got an empty file")
    return rows


def columns_of(rows: Rows) -> list[str]:
    """Every column name, in the order of first appearance."""
    # A row that is too long has its surplus under None.
    return list(dict.fromkeys(name for row in rows for name in row if isinstance(name, str)))


def curve(rows: Rows, column: str, *, step: str = "step") -> Curve:
    """The values of a column over the steps, in the order of the steps.

    A cell may be empty: a logger writes only what was measured at that step. Values that are not finite are left out. A
    resumed run may have logged a step twice; the later row counts.

    Raises:
        DataError: a value that is no number, or a value without a step.
    """
    points: dict[float, float] = {}
    for number, row in enumerate(rows, 1):
        value = _number(row.get(column), column, number)
        if value is None:
            continue
        at = _number(row.get(step), step, number)
        if at is None:
            raise DataError(f"metrics: row {number} has a value of {column!r} and none of {step!r}")
        if math.isfinite(value):
            points[at] = value
    steps = sorted(points)
    return steps, [points[at] for at in steps]


def _number(cell: Any, column: str, row: int) -> float | None:
    if cell is None or cell == "":
        return None
    try:
        return float(cell)
    except (TypeError, ValueError) as error:
        raise DataError(f"metrics: row {row}, column {column!r}: must be a number, got {cell!r}") from error
