"""Figures of a run, by matplotlib (extra ``plot``). The suffix of the file chooses the format: .png, .svg, .pdf.

Everything goes through figure objects: pyplot keeps global state and may want a display.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sma.errors import DataError, MissingExtraError
from sma.routing import Routing
from sma_models.reports.channels import channels, short_labels
from sma_models.reports.metrics import Rows, columns_of, curve, read_metrics
from sma_models.reports.picture import draw_staff, staff_size
from sma_models.reports.tables import Batches, summarise_rates

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito 2008: told apart with any colour vision; their yellow is left out, it vanishes on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
_DASHES = ("-", "--", "-.", ":")
_INK, _PALE = "#1f2328", "#59636e"


def _new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            f"figures: need matplotlib, from the extra 'plot': pip install 'sparse-modular-activation[plot]' ({error})"
        ) from error
    return Figure(figsize=(width, height), facecolor="white", layout="constrained")


def _save(figure: Figure, out: str | Path) -> Path:
    """Write the figure; the same figure gives the same bytes, so that a kept picture changes only with its content."""
    import matplotlib

    path = Path(out)
    known = figure.canvas.get_supported_filetypes()
    if path.suffix.lstrip(".") not in known:
        raise DataError(
            f"{path}: the name of a figure must end in one of {', '.join(sorted(known))}, got {path.suffix!r}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    undated: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix, {})
    with matplotlib.rc_context({"svg.hashsalt": "sma"}):
        figure.savefig(path, dpi=200, metadata=undated)
    return path


def layer_colours(n: int) -> list[Any]:
    """``n`` colours that can be told apart; more than seven are shades of one scale, in order of depth."""
    if n <= len(_COLOURS):
        return list(_COLOURS[:n])
    import matplotlib

    scale = matplotlib.colormaps["viridis"]
    return [scale(0.9 * i / (n - 1)) for i in range(n)]


def _plain_axes(figure: Figure, title: str, x_label: str, y_label: str) -> Axes:
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", color=_INK, fontsize=12)
    axes.set_xlabel(x_label, color=_PALE)
    axes.set_ylabel(y_label, color=_PALE)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#d8dee4", linewidth=0.7)
    axes.set_axisbelow(True)
    return axes


def _lines(axes: Axes, curves: Sequence[tuple[str, tuple[list[float], list[float]]]]) -> None:
    """One line per curve, with a legend beside the axes: colour and dashes differ."""
    colours = layer_colours(len(curves))
    for i, (label, (steps, values)) in enumerate(curves):
        dots = "o" if len(steps) < 3 else None
        axes.plot(steps, values, color=colours[i], linestyle=_DASHES[i % 4], linewidth=1.8, label=label, marker=dots)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)


def rates_over_training(
    metrics: str | Path | Rows,
    out: str | Path,
    *,
    prefix: str = "rate/",
    step: str = "step",
    title: str = "Activation rate over training",
) -> Path:
    """A line for each layer: its activation rate over the training steps.

    Args:
        metrics: path of a ``metrics.csv``, or its rows.
        out: the figure's file.
        prefix: columns that begin so are rates; the rest of their name is that of the layer.
        step: the column of the steps.
        title: above the figure.

    Raises:
        DataError: no such column, no values, or the file cannot be read.
        MissingExtraError: matplotlib is not installed.
    """
    rows = read_metrics(metrics)
    names = [name for name in columns_of(rows) if name.startswith(prefix)]
    curves = _curves(rows, names, step, f"whose name begins with {prefix!r}")
    labels = short_labels([name.removeprefix(prefix) for name, _ in curves])
    figure = _new_figure(8, 3.6)
    axes = _plain_axes(figure, title, "training step", "share of tokens that activate")
    _lines(axes, [(label, points) for label, (_, points) in zip(labels, curves, strict=True)])
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(_percent_formatter())
    return _save(figure, out)


def loss_curve(
    metrics: str | Path | Rows,
    out: str | Path,
    *,
    columns: Sequence[str] | None = None,
    step: str = "step",
    title: str = "Loss over training",
    y_label: str = "loss",
) -> Path:
    """A line for each column of losses over the training steps.

    Args:
        metrics: path of a ``metrics.csv``, or its rows.
        out: the figure's file.
        columns: which; by default every column whose name ends in "loss".
        step: the column of the steps.
        title: above the figure.
        y_label: with the unit.

    Raises:
        DataError: no such column, no values, or the file cannot be read.
        MissingExtraError: matplotlib is not installed.
    """
    rows = read_metrics(metrics)
    present = columns_of(rows)
    for name in columns or ():
        if name not in present:
            raise DataError(f"metrics: no column {name!r}; there are: {', '.join(present) or 'none'}")
    names = list(columns) if columns else [name for name in present if name.endswith("loss")]
    curves = _curves(rows, names, step, "whose name ends in 'loss'")
    figure = _new_figure(8, 3.6)
    _lines(_plain_axes(figure, title, "training step", y_label), curves)
    return _save(figure, out)


def _curves(
    rows: Rows, names: Sequence[str], step: str, rule: str
) -> list[tuple[str, tuple[list[float], list[float]]]]:
    curves = [(name, curve(rows, name, step=step)) for name in names]
    curves = [(name, points) for name, points in curves if points[0]]
    if not curves:
        raise DataError(f"metrics: no column {rule} has values; columns: {', '.join(columns_of(rows)) or 'none'}")
    return curves


def _percent_formatter() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0, decimals=0, symbol=" %")


def rates_by_layer(routings: Batches, out: str | Path, *, title: str = "Activation rate by layer") -> Path:
    """A bar for each layer, first layer left: the mean rate, and a whisker of one standard deviation over sequences.

    Raises:
        DataError: no layer, or no sequence with a token.
        MissingExtraError: matplotlib is not installed.
    """
    rows = [row for row in summarise_rates(routings) if row.mean is not None]
    if not rows:
        raise DataError("rates_by_layer: there must be at least one layer and one sequence with a token, got none")
    figure = _new_figure(max(4.0, 1.5 + 0.8 * len(rows)), 3.6)
    axes = _plain_axes(figure, title, "", "share of tokens that activate")
    means = [row.mean or 0.0 for row in rows]
    spread = [row.std or 0.0 for row in rows]
    places = list(range(len(rows)))
    axes.bar(places, means, yerr=spread, color=layer_colours(len(rows)), ecolor=_INK, capsize=4, width=0.7)
    for place, mean, std in zip(places, means, spread, strict=True):
        axes.annotate(
            f"{100 * mean:.0f} %", (place, mean + std), (0, 4), textcoords="offset points", ha="center", color=_INK
        )
    axes.set_xticks(places, [row.label if len(row.label) < 9 else row.label.replace(" ", "\n") for row in rows])
    axes.set_ylim(0, max(1.0, *(mean + std for mean, std in zip(means, spread, strict=True))) * 1.08)
    axes.yaxis.set_major_formatter(_percent_formatter())
    return _save(figure, out)


def activation_picture(
    data: bytes | str,
    routings: Mapping[str, Routing],
    out: str | Path,
    *,
    sample: int = 0,
    columns: int = 72,
    title: str = "Which bytes activate each layer",
) -> Path:
    """The text, and under each byte a bar for each layer that it activates: a staff of coloured lines.

    The first layer is on top; the rates in the legend are those of this text. Made for a few hundred bytes and the
    width of a README; :func:`~sma_models.reports.heat_map.text_heat_map` shows more.

    Args:
        data: the sequence; a str is encoded in UTF-8, as one token per byte.
        routings: as the model returned them.
        out: the figure's file.
        sample: row of the batch that holds the sequence.
        columns: bytes per row; lines of the text break there.
        title: above the figure.

    Raises:
        DataError: no bytes, or fewer than 8 columns.
        RoutingError: the routings are not of this text.
        MissingExtraError: matplotlib is not installed.
    """
    text = data.encode() if isinstance(data, str) else bytes(data)
    if not text:
        raise DataError("activation_picture: data must hold at least one byte, got none")
    if columns < 8:
        raise DataError(f"activation_picture: columns must be at least 8, got {columns}")
    layers = channels(len(text), routings, sample)
    figure = _new_figure(*staff_size(text, columns, layers))
    draw_staff(figure, text, layers, layer_colours(len(layers)), columns, title)
    return _save(figure, out)
