"""The results of the runs: one JSON file for each, and where they are kept.

Of a training run its ``metrics.csv`` and ``summary.json`` are read, nothing else.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch

import sma
from experiments.plan import ROOT, Entry, read_experiment, read_queue
from sma.errors import ConfigError

POINTS = 100
"""A curve keeps at most so many points, and those of evaluations."""
State = Literal["todo", "partial", "failed", "done"]
Record = dict[str, Any]


def environment(commit: str | None = None) -> dict[str, Any]:
    """The environment that results depend on, besides the run itself."""
    on_gpu = torch.cuda.is_available()
    return {
        "commit": commit or _commit(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "torch": torch.__version__,
        "triton": _version("triton") if on_gpu else None,
        "python": platform.python_version(),
        "sma": sma.__version__,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def read_run(entry: Entry, folder: Path) -> Record:
    """The record of the folder of a training run."""
    rows = _rows(folder / "metrics.csv")
    summary_file = folder / "summary.json"
    summary = json.loads(summary_file.read_text(encoding="utf-8")) if summary_file.is_file() else {}
    steps = int(rows[-1]["step"]) if rows else 0
    curve = _columns(_thinned(rows))
    return {
        "experiment": entry.experiment,
        "task": entry.task,
        "variant": entry.variant,
        "seed": entry.seed,
        **entry.definition(),
        "steps": summary.get("steps", steps),
        "finished": bool(summary),
        "training_seconds": summary.get("training_seconds", rows[-1].get("seconds") if rows else 0.0),
        "parameters": summary.get("parameters"),
        "final": {name: each for name, each in summary.items() if isinstance(each, dict) and "loss" in each},
        "graphs": summary.get("graphs"),
        "peak_memory_mib": summary.get("peak_memory_mib"),
        "curve": {name: values for name, values in curve.items() if not name.startswith("rate/")},
        "rates": {name.removeprefix("rate/"): each for name, each in curve.items() if name.startswith("rate/")},
    }


def _rows(path: Path) -> list[dict[str, float]]:
    """The lines of ``metrics.csv``; a line that was cut off in writing is left out."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="ascii")
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(lines)]


def _thinned(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    every = -(-len(rows) // POINTS) or 1
    kept = [row for n, row in enumerate(rows) if (n + 1) % every == 0 or "validation_loss" in row]
    return [*kept, rows[-1]] if rows and (not kept or kept[-1] is not rows[-1]) else kept


def _columns(rows: list[dict[str, float]]) -> dict[str, list[float | None]]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [_short(row.get(name)) for row in rows] for name in names}


def _short(value: float | None) -> float | None:
    return None if value is None else int(value) if value == int(value) else float(f"{value:.5g}")


def save(folder: Path, entry: Entry, record: Record) -> None:
    """Write ``<folder>/<key>.json``, complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / f"{entry.key}.json", record)


def _write(path: Path, record: Record) -> None:
    parts = (f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in record.items())
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    os.replace(temporary, path)


def load(path: Path, entry: Entry) -> Record | None:
    """The record in a file, if the file exists and is of the same recipe, changes and steps."""
    if not path.is_file():
        return None
    record = _record(path.read_text(encoding="utf-8"), str(path))
    return record if matches(entry, record) else None


def _record(text: str, place: str) -> Record:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{place}: must be JSON, got {error}") from error
    if not isinstance(record, dict) or not {"experiment", "task", "variant", "seed", "steps"} <= record.keys():
        raise ConfigError(f"{place}: must be the result of a run, got {text[:40]!r}")
    return record


def matches(entry: Entry, record: Record) -> bool:
    """Whether a record is of the run as it is defined now."""
    return all(record.get(name) == value for name, value in entry.definition().items())


def collected_path(entry: Entry, root: Path = ROOT) -> Path:
    """Where the project keeps the result of a run."""
    return root / entry.experiment / "results" / entry.task / f"{entry.variant}-s{entry.seed}.json"


def best(entry: Entry, folder: Path | None, root: Path = ROOT) -> Record | None:
    """The record that got furthest: the project's, or that in the working folder."""
    found = [load(collected_path(entry, root), entry)]
    if folder is not None:
        found.append(load(folder / "results" / f"{entry.key}.json", entry))
    return max((each for each in found if each is not None), key=_progress, default=None)


def _progress(record: Record) -> tuple[bool, int]:
    return bool(record.get("finished")), int(record["steps"])


def state(record: Record | None) -> State:
    """How far a run is."""
    if record is None:
        return "todo"
    if record.get("finished"):
        return "done"
    return "failed" if record.get("failed") else "partial" if record["steps"] else "todo"


def collect(sources: Sequence[Path], root: Path = ROOT) -> tuple[list[Path], list[str]]:
    """Take records over into the project: from folders, from the tar files in them, or from such files.

    A record stays that got further than the one that comes, unless it is of an older definition of the run.

    Returns:
        The files that changed; the places of records that no run of the queue has any more.

    Raises:
        ConfigError: there are no records, or one is broken.
    """
    entries = {entry.key: entry for entry in read_queue(root)}
    changed: list[Path] = []
    strangers: list[str] = []
    records = [(place, _record(text, place)) for place, text in _records(sources)]
    if not records:
        raise ConfigError(f"{', '.join(map(str, sources))}: must hold results (results/*.json, results.tar), got none")
    for place, record in records:
        entry = entries.get(f"{record['experiment']}.{record['task']}.{record['variant']}.s{record['seed']}")
        if entry is None or not matches(entry, record):
            strangers.append(place)
        elif _is_news(record, load(collected_path(entry, root), entry)):
            path = collected_path(entry, root)
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, record)
            changed.append(path)
    for name in {path.parents[2].name for path in changed}:
        write_tables(name, root)
    return changed, strangers


def _is_news(record: Record, before: Record | None) -> bool:
    return state(record) != "todo" and (before is None or _progress(record) > _progress(before))


def _records(sources: Iterable[Path]) -> Iterator[tuple[str, str]]:
    for source in sources:
        for path in sorted([*source.glob("results/*.json"), *source.glob("*.json")]):
            yield str(path), path.read_text(encoding="utf-8")
        for path in [source] if source.is_file() else sorted(source.glob("results*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    file = tar.extractfile(member) if member.name.endswith(".json") else None
                    if file is not None:
                        yield f"{path}: {member.name}", file.read().decode("utf-8")


def collected(name: str, root: Path = ROOT) -> dict[str, list[Record]]:
    """The records of an experiment by task, those of its present definition, in the order of its variants."""
    experiment = read_experiment(name, root)
    found: dict[str, list[Record]] = {}
    for task in experiment.tasks:
        for variant in experiment.variants:
            for path in sorted((experiment.folder / "results" / task).glob(f"{variant}-s*.json")):
                seed = path.stem.rpartition("-s")[2]
                record = load(path, experiment.entry(task, variant, int(seed))) if seed.isdigit() else None
                if record is not None:
                    found.setdefault(task, []).append(record)
    return found


def write_tables(name: str, root: Path = ROOT) -> None:
    """Write ``<experiment>/results/<task>.csv``: a line for each run."""
    for task, records in collected(name, root).items():
        rows = [row(record) for record in records]
        path = root / name / "results" / f"{task}.csv"
        with open(path, "w", encoding="utf-8", newline="") as file:
            names = list(dict.fromkeys(column for each in rows for column in each))
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def row(record: Record) -> dict[str, Any]:
    """A record in one line: the results, and the share of active tokens in each layer on the test split."""
    line = {name: record[name] for name in ("variant", "seed", "steps", "finished", "parameters", "training_seconds")}
    line["wall_seconds"] = record.get("wall_seconds")
    for split, result in record["final"].items():
        line |= {f"{split}_{name}": result[name] for name in ("loss", "accuracy", "bits_per_byte") if name in result}
    rates = layer_rates(record)
    line["rate"] = round(sum(rates) / len(rates), 5) if rates else None
    line["rate_of_each_layer"] = " ".join(f"{each:.4f}" for each in rates)
    line |= {name: record.get(name) for name in ("device", "torch", "commit")}
    return line


def layer_rates(record: Record) -> list[float]:
    """The share of active tokens in each layer: on the last split that was judged, or late in training."""
    judged = list(record["final"].values())
    if judged:
        return [rate for each in judged[-1]["activation_rate"].values() for rate in each]
    return [values[-1] for values in record["rates"].values() if values and values[-1] is not None]
