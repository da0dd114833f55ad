"""The drawing behind :func:`~sma_models.reports.figures.activation_picture`; needs matplotlib.

Unit of length: the width of one character. y points down, from 0 at the top of the figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any

from sma_models.reports.channels import Channel
from sma_models.reports.glyphs import Glyph, glyphs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FONT = "DejaVu Sans Mono"  # matplotlib brings it along, so a picture looks the same everywhere
_ADVANCE = 0.602  # width of its characters over the size of the font
_WIDTH_INCHES = 9.0
_MARGIN = 1.2
_TITLE, _LEGEND, _TEXT, _BAR, _GAP = 2.6, 2.1, 1.7, 0.52, 0.9
_BOX = "\u25a1"
_INK, _PALE, _STAFF = "#1f2328", "#8c959f", "#eaeef2"


def rows_of(data: bytes, columns: int) -> list[range]:
    r"""Which bytes stand in which row: a row ends after one or more line ends, or when it is full.

    Empty lines go to the row before them, where they cost no height.

    Example:
        >>> rows_of(b"ab\ncde", 2)
        [range(0, 2), range(2, 3), range(3, 5), range(5, 6)]
    """
    rows: list[range] = []
    start = 0
    for i, byte in enumerate(data):
        lines_end = byte == 0x0A and data[i + 1 : i + 2] != b"\n"
        if lines_end or i + 1 - start == columns or i + 1 == len(data):
            rows.append(range(start, i + 1))
            start = i + 1
    return rows


def _legend_columns(layers: Sequence[Channel], columns: int) -> int:
    """How many entries fit beside each other: swatch, label, rate and some air."""
    return max(1, min(len(layers), columns // (max(len(layer.label) for layer in layers) + 5)))


def _heights(data: bytes, columns: int, layers: Sequence[Channel]) -> tuple[float, float, float]:
    """Of the head (title and legend), of one row, and of all."""
    head = _TITLE + _LEGEND * -(-len(layers) // _legend_columns(layers, columns))
    row = _TEXT + _BAR * len(layers) + _GAP
    return head, row, _MARGIN + head + row * len(rows_of(data, columns)) + _MARGIN - _GAP


def staff_size(data: bytes, columns: int, layers: Sequence[Channel]) -> tuple[float, float]:
    """Width and height of the figure in inches."""
    return _WIDTH_INCHES, _heights(data, columns, layers)[2] * _WIDTH_INCHES / (columns + 2 * _MARGIN)


def draw_staff(
    figure: Figure, data: bytes, layers: Sequence[Channel], colours: Sequence[Any], columns: int, title: str
) -> None:
    """Draw title, legend, and the rows of text with their bars."""
    head, row_height, total = _heights(data, columns, layers)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(-_MARGIN, columns + _MARGIN)
    axes.set_ylim(total, 0)
    size = _WIDTH_INCHES * 72 / (columns + 2 * _MARGIN) / _ADVANCE * 0.94
    axes.text(0, _MARGIN + 0.8, title, fontsize=max(size, 12), color=_INK, va="center", weight="bold", parse_math=False)
    _draw_legend(axes, layers, colours, columns, max(size * 0.85, 8))
    shown = glyphs(data)
    for number, row in enumerate(rows_of(data, columns)):
        top = _MARGIN + head + number * row_height
        for column, i in enumerate(row):
            text, colour, scale = _drawable(shown[i])
            if text.strip():
                place = (column + 0.5, top + 0.85)
                axes.text(
                    *place,
                    text,
                    family=_FONT,
                    fontsize=size * scale,
                    color=colour,
                    ha="center",
                    va="center",
                    parse_math=False,
                )
        for m, layer in enumerate(layers):
            y = top + _TEXT + m * _BAR
            axes.broken_barh([(0, len(row))], (y, _BAR * 0.82), facecolors=_STAFF, linewidth=0)
            runs = _runs(layer, row)
            if runs:
                axes.broken_barh(runs, (y, _BAR * 0.82), facecolors=[colours[m]], linewidth=0)


def _draw_legend(axes: Axes, layers: Sequence[Channel], colours: Sequence[Any], columns: int, size: float) -> None:
    abreast = _legend_columns(layers, columns)
    for m, layer in enumerate(layers):
        x = (m % abreast) * columns / abreast
        y = _MARGIN + _TITLE + (m // abreast) * _LEGEND
        axes.broken_barh([(x, 1.6)], (y - 0.4, 0.8), facecolors=[colours[m]], linewidth=0)
        label = f"{layer.label}  {100 * layer.rate:.0f} %"
        axes.text(x + 2.2, y, label, fontsize=size, color=_INK, va="center", parse_math=False)


def _runs(layer: Channel, row: range) -> list[tuple[float, float]]:
    """Start and width of each run of active bytes in a row."""
    runs: list[tuple[float, float]] = []
    for active, group in groupby(range(len(row)), key=lambda column: bool(layer.active[row[column]])):
        columns = list(group)
        if active:
            runs.append((columns[0], len(columns)))
    return runs


def _drawable(glyph: Glyph) -> tuple[str, str, float]:
    """Text, colour and relative size, to fit a cell: a byte outside UTF-8 is two digits, other labels are a box."""
    if glyph.kind == "invalid":
        return glyph.text[2:], _PALE, 0.52
    if len(glyph.text) > 2 or not all(_in_font(character) for character in glyph.text):
        return _BOX, _PALE, 0.8
    if glyph.kind == "char":
        return glyph.text, _INK, 1.0
    return glyph.text, _PALE, 1.0 if len(glyph.text) == 1 else 0.52


@cache
def _in_font(character: str) -> bool:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return bool(get_font(findfont(FontProperties(family=_FONT))).get_char_index(ord(character)))
