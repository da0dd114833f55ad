"""Figures are written, hold what they should, and leave matplotlib's global state alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sma.errors import DataError, MissingExtraError, RoutingError
from sma_models.reports import activation_picture, loss_curve, rates_by_layer, rates_over_training
from sma_models.reports import figures as module
from sma_models.reports.channels import channels
from sma_models.reports.metrics import curve, read_metrics
from sma_models.reports.picture import draw_staff, rows_of, staff_size
from tests.reports.conftest import MakeRoutings

figure_module = pytest.importorskip("matplotlib.figure", reason="the extra 'plot' is not installed")

ROWS: list[dict[str, Any]] = [
    {"step": 10, "train/loss": 3.0, "rate/layers.0.activate": 0.5, "rate/layers.1.activate": 0.25},
    {"step": 20, "train/loss": 2.0, "rate/layers.0.activate": 0.4, "rate/layers.1.activate": ""},
    {"step": 20, "val/loss": "2.5"},
    {"step": 30, "train/loss": float("nan"), "rate/layers.0.activate": 0.3, "rate/layers.1.activate": 0.75},
]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were saved, for a look inside."""
    kept: list[Any] = []
    save = module._save
    monkeypatch.setattr(module, "_save", lambda figure, out: (kept.append(figure), save(figure, out))[1])
    return kept


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_rates_over_training_from_a_file(tmp_path: Path, drawn: list[Any]) -> None:
    log = tmp_path / "metrics.csv"
    names = ["step", "rate/layers.0.activate", "rate/layers.1.activate"]
    log.write_text("\n".join([",".join(names)] + [",".join(str(row.get(n, "")) for n in names) for row in ROWS]))
    assert is_png(rates_over_training(log, tmp_path / "new" / "rates.png"))
    lines = drawn[0].axes[0].get_lines()
    assert [line.get_label() for line in lines] == ["layer 0", "layer 1"]
    assert lines[0].get_xydata().tolist() == [[10, 0.5], [20, 0.4], [30, 0.3]]
    assert lines[1].get_xydata().tolist() == [[10, 0.25], [30, 0.75]]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 2


def test_loss_curve_takes_every_loss_or_those_named(tmp_path: Path, drawn: list[Any]) -> None:
    loss_curve(ROWS, tmp_path / "loss.svg")
    assert [line.get_label() for line in drawn[0].axes[0].get_lines()] == ["train/loss", "val/loss"]
    assert drawn[0].axes[0].get_lines()[0].get_xydata().tolist() == [[10, 3], [20, 2]]
    loss_curve(ROWS, tmp_path / "one.svg", columns=["val/loss"], y_label="bits per byte")
    assert [line.get_label() for line in drawn[1].axes[0].get_lines()] == ["val/loss"]
    assert drawn[1].axes[0].get_ylabel() == "bits per byte"


def test_the_same_figure_is_the_same_file(tmp_path: Path) -> None:
    first, second = (loss_curve(ROWS, tmp_path / f"{name}.svg").read_bytes() for name in "ab")
    assert first == second
    assert b"<svg" in first


def test_metrics_that_a_resumed_run_wrote_twice() -> None:
    assert curve([{"step": 2, "x": 1}, {"step": 1, "x": 5}, {"step": 2, "x": 3}], "x") == ([1, 2], [5, 3])


def test_bad_metrics(tmp_path: Path) -> None:
    out = tmp_path / "figure.png"
    with pytest.raises(DataError, match=r"nowhere\.csv: cannot be read"):
        rates_over_training(tmp_path / "nowhere.csv", out)
    for content, rule in ((b"", "must have a header"), (b"step\n\xff\xfe", "must be a CSV file in UTF-8")):
        (tmp_path / "bad.csv").write_bytes(content)
        with pytest.raises(DataError, match=rule):
            read_metrics(tmp_path / "bad.csv")
    with pytest.raises(DataError, match="begins with 'rate/' has values; columns: step, loss"):
        rates_over_training([{"step": 1, "loss": 2}], out)
    with pytest.raises(DataError, match="no column 'los'; there are: step, loss"):
        loss_curve([{"step": 1, "loss": 2}], out, columns=["los"])
    with pytest.raises(DataError, match="row 2, column 'loss': must be a number, got 'x'"):
        loss_curve([{"step": 1, "loss": 2}, {"step": 2, "loss": "x"}], out)
    with pytest.raises(DataError, match="row 1 has a value of 'loss' and none of 'step'"):
        loss_curve([{"loss": 2}], out)
    with pytest.raises(DataError, match=r"must end in one of .*png.*, got '\.gnp'"):
        loss_curve(ROWS, tmp_path / "figure.gnp")
    assert not out.exists()


@pytest.mark.parametrize("n_layers", [1, 3, 12])
def test_rates_by_layer(tmp_path: Path, drawn: list[Any], make_routings: MakeRoutings, n_layers: int) -> None:
    routings = make_routings(40, n_layers=n_layers, batch=3)
    assert is_png(rates_by_layer(routings, tmp_path / "bars.png"))
    heights = [bar.get_height() for bar in drawn[0].axes[0].patches]
    assert heights == pytest.approx([float(routing.rate().mean()) for routing in routings.values()])
    assert len({bar.get_facecolor() for bar in drawn[0].axes[0].patches}) == n_layers


def test_rates_by_layer_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one layer"):
        rates_by_layer({}, tmp_path / "bars.png")


@pytest.mark.parametrize("n_layers", [1, 9])
def test_picture_of_any_bytes(tmp_path: Path, make_routings: MakeRoutings, n_layers: int) -> None:
    data = "x = '$y$'\t# é 日 e\u0301 \u202e\n\n".encode() + bytes([0, 27, 200, 255])
    routings = make_routings(len(data), n_layers=n_layers, padding=2)
    assert is_png(activation_picture(data, routings, tmp_path / "picture.png", columns=20, title="$odd"))


def test_picture_marks_exactly_the_active_bytes(make_routings: MakeRoutings) -> None:
    data = b"def f(x):\n    return x + 1\n"
    layers = channels(len(data), make_routings(len(data)))
    figure = figure_module.Figure(figsize=staff_size(data, 12, layers))
    colours = ["#ff0000", "#00ff00", "#0000ff"]
    draw_staff(figure, data, layers, colours, 12, "title")
    rows = rows_of(data, 12)
    assert [i for row in rows for i in row] == list(range(len(data)))
    bars = figure.axes[0].collections[len(layers) :]  # behind the legend's
    painted = dict.fromkeys(colours, 0.0)
    for bar in bars:
        colour = next((c for c in colours if figure_colour(bar) == c), None)
        if colour:
            painted[colour] += sum(float(path.get_extents().width) for path in bar.get_paths())
    assert list(painted.values()) == pytest.approx([float(layer.active.sum()) for layer in layers])
    letters = "".join(text.get_text() for text in figure.axes[0].texts[1 + len(layers) :])
    assert letters == "deff(x):↵returnx+1↵"


def figure_colour(collection: Any) -> str:
    colours = pytest.importorskip("matplotlib.colors")
    return str(colours.to_hex(collection.get_facecolor()[0]))


def test_picture_refuses_what_does_not_fit(tmp_path: Path, make_routings: MakeRoutings) -> None:
    out = tmp_path / "picture.png"
    with pytest.raises(RoutingError, match="3 real tokens, the text has 4 bytes"):
        activation_picture("abcd", make_routings(3), out)
    with pytest.raises(DataError, match="at least one byte"):
        activation_picture("", make_routings(3), out)
    with pytest.raises(DataError, match="columns must be at least 8, got 3"):
        activation_picture("abc", make_routings(3), out, columns=3)
    assert not out.exists()


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"sparse-modular-activation\[plot\]"):
        loss_curve(ROWS, tmp_path / "loss.png")


def test_importing_reports_needs_no_matplotlib_and_figures_no_pyplot(tmp_path: Path) -> None:
    program = (
        "import sys; from sma_models.reports import loss_curve\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"loss_curve([{{'step': 1, 'loss': 2.0}}], {str(tmp_path / 'loss.png')!r})\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
