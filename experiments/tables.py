"""The table and the figures of an experiment, from the results that the project keeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiments.plan import ROOT, read_experiment
from experiments.results import Record, collected, layer_rates

QUALITIES = {"accuracy": ("right, %", 100.0), "bits_per_byte": ("bits per byte", 1.0)}
"""The measures: name and factor."""


def table(name: str, root: Path = ROOT) -> str:
    """A table in Markdown for each task: mean and spread over the seeds of every variant."""
    parts = [_task_table(task, records) for task, records in collected(name, root).items()]
    return "\n\n".join(parts) or f"{name}: no results yet"


def _task_table(task: str, records: Sequence[Record]) -> str:
    quality = quality_of(records)
    head = ["variant", "seeds", QUALITIES[quality][0] if quality else "result", "active, %", "active in each layer, %"]
    lines = [[*head, "training, s"], ["---"] * 6]
    for variant, each in by_variant(records).items():
        finished = [record for record in each if record["finished"]]
        unfinished = [f"seed {record['seed']}: {record['steps']:,} steps" for record in each if not record["finished"]]
        if finished and quality:
            lines.append(_line(variant, finished, quality))
        if unfinished:
            lines.append([variant, "unfinished", *[""] * 3, "; ".join(unfinished)])
    return f"### {task}, {records[0]['steps_in_all']:,} steps\n\n" + "\n".join(f"| {' | '.join(r)} |" for r in lines)


def _line(variant: str, records: Sequence[Record], quality: str) -> list[str]:
    layers = [layer_rates(record) for record in records]
    return [
        variant,
        str(len(records)),
        spread([result(record, quality) for record in records], 2 if quality == "accuracy" else 3),
        spread([100 * mean(each) for each in layers if each], 1),
        " ".join(f"{100 * mean(each):.0f}" for each in zip(*layers, strict=True)),
        spread([record["training_seconds"] for record in records], 0),
    ]


def by_variant(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each variant, in the order in which they come."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["variant"], []).append(record)
    return found


def quality_of(records: Sequence[Record]) -> str | None:
    """The measure of the finished runs; None without finished runs."""
    judged = (record["final"]["test"] for record in records if "test" in record["final"])
    return next((name for each in judged for name in QUALITIES if name in each), None)


def result(record: Record, quality: str) -> float:
    """The result on the test split, as it is shown."""
    return float(record["final"]["test"][quality] * QUALITIES[quality][1])


def spread(values: Sequence[float], digits: int) -> str:
    """Mean, and standard deviation of a sample where there are several values."""
    if not values:
        return ""
    shown = f"{mean(values):,.{digits}f}"
    return f"{shown} ± {stdev(values):.{digits}f}" if len(values) > 1 else shown


def draw(name: str, root: Path = ROOT) -> list[Path]:
    """Draw two figures for each task: the result against the rate, and the rates of the layers over training.

    Returns:
        Their paths, ``<experiment>/results/<task>.png`` and ``<task>-rates.png``.
    """
    paths: list[Path] = []
    folder = read_experiment(name, root).folder / "results"
    for task, records in collected(name, root).items():
        if quality_of(records):
            paths.append(_draw_results(folder / f"{task}.png", task, records))
        if any(record["rates"] for record in records):
            paths.append(_draw_rates(folder / f"{task}-rates.png", task, records))
    return paths


def _figure(**options: Any) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(layout="constrained", **options)


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _draw_results(path: Path, task: str, records: Sequence[Record]) -> Path:
    quality = quality_of(records)
    assert quality is not None
    figure, axes = _figure(figsize=(6.4, 4.0))
    for variant, each in by_variant([record for record in records if record["finished"]]).items():
        rates = [100 * mean(layer_rates(record) or [0.0]) for record in each]
        values = [result(record, quality) for record in each]
        points = axes.plot(rates, values, "o", alpha=0.5, markersize=4)
        errors = stdev(values) if len(values) > 1 else 0.0
        axes.errorbar(mean(rates), mean(values), errors, fmt="s", color=points[0].get_color(), capsize=3, label=variant)
    axes.set_xlabel("active tokens on the test split, % (mean of the layers)")
    axes.set_ylabel(f"test: {QUALITIES[quality][0]}")
    axes.set_title(f"{task}, {records[0]['steps_in_all']:,} steps: squares are means, bars one standard deviation")
    axes.title.set_fontsize(9)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return _save(figure, path)


def _draw_rates(path: Path, task: str, records: Sequence[Record]) -> Path:
    """One panel for each variant; of its seeds the first."""
    first = {variant: each[0] for variant, each in by_variant(records).items() if each[0]["rates"]}
    columns = min(3, len(first))
    rows = -(-len(first) // columns)
    size = (2.8 * columns + 0.6, 2.2 * rows + 0.3)
    figure, grid = _figure(nrows=rows, ncols=columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(first) :]:
        axes.set_visible(False)
    for axes, (variant, record) in zip(grid.flat, first.items(), strict=False):
        for number, values in enumerate(record["rates"].values()):
            shown = [float("nan") if each is None else 100 * each for each in values]
            axes.plot(record["curve"]["step"], shown, linewidth=1, label=f"layer {number}")
        axes.set_title(f"{variant}, seed {record['seed']}", fontsize=9)
        axes.grid(alpha=0.3)
    grid[0][0].legend(fontsize=7)
    figure.supxlabel("training step", fontsize=9)
    figure.supylabel(f"{task}: active tokens, %", fontsize=9)
    return _save(figure, path)
