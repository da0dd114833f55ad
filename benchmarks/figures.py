"""Figures of the documentation, from the results of sweeps. Needs matplotlib (extra ``plot``) and no GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.archive import TEXT, figure_name, latest_streams, latest_sweeps, read
from benchmarks.timing import Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {"sparse": "#0072B2", "dense": "#D55E00", "Transformer, flash": "#009E73"}
"""Okabe and Ito 2008: told apart with any colour vision."""


def draw(files: Sequence[Path], out: Path) -> list[Path]:
    """One SVG for each sweep name, a panel for each of its lines, and one of the streams; returns the files that were
    written.
    """
    records = [read(file) for file in files]
    named: dict[str, list[dict[str, Any]]] = {}
    for sweep in latest_sweeps(records):
        named.setdefault(sweep["sweep"], []).append(sweep)
    drawn = [_draw(name, sweeps, out / figure_name(name)) for name, sweeps in named.items()]
    streams = latest_streams(records)
    return [*drawn, _draw_stream(streams[-1], out / figure_name("stream"))] if streams else drawn


def draw_text_run(out: Path) -> Path:
    """The activation rates over the training of the Text task, with the first seed."""
    from sma_models.reports.figures import rates_over_training

    run = min(TEXT.iterdir())
    return rates_over_training(run / "metrics.csv", out / "text_rates.png", title="LRA Text: activation rate by layer")


def _draw(name: str, sweeps: Sequence[dict[str, Any]], path: Path) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(sweeps), 3.6), facecolor="white", layout="constrained")
    for axes, sweep in zip(figure.subplots(1, len(sweeps), squeeze=False)[0], sweeps, strict=True):
        _panel(axes, sweep)
    return _saved(figure, path)


def _draw_stream(stream: dict[str, Any], path: Path) -> Path:
    """Times on the left, memory on the right, over the tokens so far."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), facecolor="white", layout="constrained")
    times, memory = figure.subplots(1, 2)
    points = stream["points"]
    steps = [Spread.of(point["step_ms"]) for point in points]
    lines = [
        (times, "decoding step", [step.median if step else float("nan") for step in steps], "#0072B2"),
        (times, "reading 1,000 tokens", [point["read_ms"] for point in points], "#D55E00"),
        (memory, "state", [point["state_mib"] for point in points], "#0072B2"),
    ]
    if points[0]["allocated_mib"] is not None:
        allocated = [point["allocated_mib"] for point in points]
        lines.append((memory, "all that is allocated", allocated, "#009E73"))
    for axes, label, values, colour in lines:
        tokens = [point["tokens"] for point in points]
        axes.plot(tokens, values, marker="o", markersize=3, color=colour, label=label)
    for axes, unit in ((times, "ms"), (memory, "MiB")):
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens read before")
        axes.set_ylabel(unit)
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return _saved(figure, path)


def _saved(figure: Figure, path: Path) -> Path:
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    # The same results give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "sma"}):
        figure.savefig(path, metadata={"Date": None})
    return path


def _panel(axes: Axes, sweep: dict[str, Any]) -> None:
    labels = dict.fromkeys(row["model"] for point in sweep["points"] for row in point["rows"])
    for label in labels:
        points = [
            (point["x"], spread)
            for point in sweep["points"]
            for row in point["rows"]
            if row["model"] == label and (spread := Spread.of(row["train_ms"]))
        ]
        if points:
            x, colour = [x for x, _ in points], COLOURS.get(label, "#333333")
            axes.plot(x, [each.median for _, each in points], marker="o", markersize=3, color=colour, label=label)
            low, high = [each.low for _, each in points], [each.high for _, each in points]
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    where = sweep.get("crossover_train_ms")
    if where:
        axes.axvline(where, color="#59636e", linewidth=0.8, linestyle=":")
        axes.annotate(f" {where:.3g}", (where, 0.03), xycoords=("data", "axes fraction"), color="#59636e", fontsize=8)
    if sweep["axis"] == "active share":
        axes.set_ylim(bottom=0)
    else:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks([point["x"] for point in sweep["points"]], [_short(point["x"]) for point in sweep["points"]])
        axes.minorticks_off()
    axes.set_title(sweep["title"], fontsize=9)
    axes.set_xlabel(sweep["axis"])
    axes.set_ylabel("forward and backward, ms")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _short(x: float) -> str:
    return f"{x / 1024:g}K" if x >= 1024 else f"{x:g}"
