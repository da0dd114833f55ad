"""Single layers over a range of activation rates, lengths and widths, sparse against always on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

import sma
from benchmarks import gate
from benchmarks.measure import measure
from benchmarks.modules import dense_ffn, features, sparse_ffn
from benchmarks.peers import FlashBlock
from benchmarks.rows import SLACK, Row, model_case
from benchmarks.shares import Ours
from benchmarks.subjects import Setting, Subject, module_subject
from benchmarks.tables import factor, milliseconds, remarks, text_table
from benchmarks.timing import Clock, Spread, crossing, times_as_fast

DENSE = "dense"


@dataclass(frozen=True)
class Point:
    """Where on the axis: the share of active tokens, and the shape."""

    x: float
    share: float
    batch: int
    length: int
    width: int


@dataclass(frozen=True)
class Sweep:
    """One line of a figure.

    Attributes:
        title: what is swept.
        axis: what ``x`` of the points is.
        module: ``ffn`` or ``seqboat``.
        points: in ascending order.
    """

    title: str
    axis: str
    module: str
    points: tuple[Point, ...]


RATES = (0.02, 0.05, 0.1, 0.15, 0.25, 0.35, 0.5, 0.7, 0.85, 1.0)
LENGTHS = tuple(1024 * 2**i for i in range(9))
WIDTHS = (64, 128, 256, 512, 1024, 2048)
TOKENS = 256 * 1024
"""Of every batch of the sweep over lengths, so that the work changes with the length only where it must."""

SWEEPS: dict[str, tuple[Sweep, ...]] = {
    "rate": (
        Sweep(
            "FFN of 1,024 to 4,096, 16K tokens", "active share", "ffn", tuple(Point(r, r, 4, 4096, 1024) for r in RATES)
        ),
        Sweep(
            "SeqBoat layer of LRA Text, 50 x 4,096",
            "active share",
            "seqboat",
            tuple(Point(r, r, 50, 4096, 128) for r in RATES),
        ),
    ),
    "length": (
        Sweep(
            "SeqBoat layer of LRA Text, 256K tokens, 15 % active",
            "length",
            "seqboat",
            tuple(Point(n, 0.15, TOKENS // n, n, 128) for n in LENGTHS),
        ),
    ),
    "width": (
        Sweep(
            "FFN to four times its width, 16K tokens, 25 % active",
            "width",
            "ffn",
            tuple(Point(d, 0.25, 4, 4096, d) for d in WIDTHS),
        ),
        Sweep(
            "SeqBoat layer, 8 x 4,096, 25 % active",
            "width",
            "seqboat",
            tuple(Point(d, 0.25, 8, 4096, d) for d in WIDTHS),
        ),
    ),
}


def seqboat(label: str, point: Point, share: float | None, graph: bool) -> Row:
    """One layer of the Text model at another width; ``share`` None activates every token without asking."""
    sizes = ["n_layers=1", f"d_model={point.width}", f"blocks[0].activate.module.d_v={2 * point.width}"]
    if share is None:
        sizes.append("blocks[0].activate.configurator={type: always}")
    capacity = [] if not graph else [f"blocks[0].activate.capacity={min(1.0, SLACK * (share or 1.0))}"]

    def build(setting: Setting) -> Subject:
        config: Any = sma.load_spec("seqboat_text", *sizes, *capacity)
        block = config.blocks[0].build(d_model=point.width, causal=False)
        layer = Ours(block, share).to(setting.device)
        x = features(setting, point.width)
        return module_subject(layer, x, setting, layer.settle if share else None, autocast=True, graph=graph)

    def check(setting: Setting) -> gate.Case:
        return model_case("seqboat_text", setting, *sizes)

    return Row(label, build, check)


def flash(graph: bool) -> Row:
    """One layer of the Transformer of LRA Text."""

    def build(setting: Setting) -> Subject:
        block: nn.Module = FlashBlock(256, 4, 1024, causal=False).to(setting.device)
        return module_subject(block, features(setting, 256), setting, autocast=True, graph=graph)

    return Row("Transformer, flash", build)


def rows_of(sweep: Sweep, point: Point, graph: bool) -> list[Row]:
    """The measurements at one point. The dense module of a sweep over rates is measured at every point too, in turns
    with the others.

    Args:
        sweep: the line of the figure.
        point: where on it.
        graph: capture everything as CUDA graphs, so that the processor that launches the kernels does not matter.
    """
    if sweep.module == "ffn":
        ours = sparse_ffn(point.width, 4 * point.width, point.share, graph=graph)
        dense = dense_ffn(point.width, 4 * point.width, graph=graph)
        return [replace(ours, label="sparse"), replace(dense, label=DENSE)]
    rows = [seqboat("sparse", point, point.share, graph), seqboat(DENSE, point, None, graph)]
    return [*rows, flash(graph)] if sweep.axis == "length" else rows


def sweep_over(name: str, setting: Setting, small: bool, rounds: int, clock: Clock) -> Iterator[dict[str, Any]]:
    """Measure the sweeps of one name, each to a mapping for the results; a small one has its first two points."""
    for sweep in SWEEPS[name]:
        measured = []
        for point in sweep.points[:2] if small else sweep.points:
            if small:
                point = Point(point.x, point.share, 2, 96, 32)
            rows = rows_of(sweep, point, setting.device.type == "cuda")
            results = measure(sweep.title, rows, setting.of(point.batch, point.length), rounds, clock)
            measured.append({"x": point.x, "rows": [asdict(result) for result in results]})
        yield {"sweep": name, "title": sweep.title, "axis": sweep.axis, "points": measured, **crossover(measured)}


def ratios(points: Sequence[dict[str, Any]], key: str = "train_ms", label: str = "sparse") -> list[tuple[float, float]]:
    """``(x, times as fast as the dense module)`` of the points at which both were measured."""
    pairs = []
    for point in points:
        rows = {row["model"]: row for row in point["rows"]}
        ratio = times_as_fast(rows.get(label, {}).get(key), rows.get(DENSE, {}).get(key))
        if ratio is not None:
            pairs.append((point["x"], ratio))
    return pairs


def crossover(points: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Where the sparse module is as fast as the dense one, in training and in the forward pass; None for nowhere."""
    return {f"crossover_{key}": crossing(ratios(points, key)) for key in ("train_ms", "forward_ms")}


def show(sweep: dict[str, Any]) -> str:
    """A table of one sweep for the terminal."""
    labels = [row["model"] for row in sweep["points"][0]["rows"]]
    speeds = dict(ratios(sweep["points"]))
    lines, wrong = [], []
    for point in sweep["points"]:
        spreads = {row["model"]: Spread.of(row["train_ms"]) for row in point["rows"]}
        cells = [milliseconds(s.median) if (s := spreads.get(label)) else "-" for label in labels]
        lines.append([f"{point['x']:g}", *cells, factor(speeds.get(point["x"]))])
        wrong += [f"{point['x']:g}, {remark}" for remark in remarks(point["rows"])]
    where = sweep["crossover_train_ms"]
    end = f"as fast as {DENSE} at {sweep['axis']} {where:.3g}" if where else f"does not cross {DENSE}"
    table = text_table([sweep["axis"], *(f"{label} ms" for label in labels), f"x {DENSE}"], lines)
    return "\n".join(["", f"{sweep['title']}: forward and backward", *wrong, table, end])
