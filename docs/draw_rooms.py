"""Draws the two pictures of "Find your way in the code": ``python docs/draw_rooms.py`` writes them to ``_static``."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

STATIC = Path(__file__).parent / "_static"
INK, FAINT = "#222222", "#666666"
BLUE, GREEN, ORANGE, WHITE = "#dce9f7", "#dff1df", "#fbe8d3", "#ffffff"

ROOMS = {
    "sma_models: assemblies, and a folder for each way of using them": (
        BLUE,
        [
            [("cli/", "the command sma"), ("training/", "recipes, loop, data"), ("serving/", "HTTP")],
            [
                ("integrations/", "hf, export, convert"),
                ("reports/", "tables, figures"),
                ("inference/", "decoder, engine"),
            ],
            [("language_model, classifier, ...", "models"), ("seqboat, mega, hybrid", "blocks"), ("specs/*.yaml", "")],
        ],
    ),
    "sma_modules: the plugins that ship": (
        GREEN,
        [[("modules/", "gau, attention, ffn, moe"), ("mixers/", "ema, ..."), ("norms, ops/", "")]],
    ),
    "sma: the mechanism; knows no particular module": (
        ORANGE,
        [
            [("layer", "SparselyActivated"), ("configurators/", "which tokens run"), ("wrap/", "stock modules")],
            [
                ("decode/, steppers", "one token in place"),
                ("runtime/", "graphs, checkpoints"),
                ("testing/", "the laws"),
            ],
            [
                ("routing, state", "values that flow"),
                ("spec/, plugins/", "names to classes"),
                ("ops/<name>/", "kernels"),
            ],
        ],
    ),
}

WAY = [
    ("router", "logits (B, L, M)", "sma/ops/router"),
    ("decision", "Routing: which tokens run", "sma/decision.py\nsma/configurators"),
    ("pack", "positions of active tokens", "sma/ops/pack"),
    ("compress", "(K, D): only active tokens", "sma/ops/compress"),
    ("module", "(K, D) to (K, D)", "sma_modules/modules\nor sma/wrap"),
    ("combine", "(B, L, D): times confidence,\nback in place, plus the skip", "sma/ops/combine"),
]


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", fc=colour, ec=FAINT)
    )


def blank(width: float, height: float) -> tuple[Figure, Axes]:
    figure = pyplot.figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def rooms() -> Figure:
    """The three packages, one above the other; each imports what lies below it."""
    row, head, gap, width = 0.62, 0.42, 0.42, 8.6
    tall = sum(head + row * len(rows) + 0.1 for _, rows in ROOMS.values()) + gap * (len(ROOMS) - 1) + 0.2
    figure, axes = blank(width, tall)
    top = tall - 0.1
    for number, (title, (colour, rows)) in enumerate(ROOMS.items()):
        height = head + row * len(rows) + 0.1
        box(axes, 0.1, top - height, width - 0.2, height, colour)
        axes.text(0.25, top - head / 2, title, va="center", fontsize=10, weight="bold", color=INK)
        for line, cells in enumerate(rows):
            for column, (name, what) in enumerate(cells):
                x, y = 0.25 + column * 2.72, top - head - (line + 1) * row + 0.06
                box(axes, x, y, 2.62, row - 0.1, WHITE)
                centre = y + (row - 0.1) / 2
                up = 0.11 if what else 0
                axes.text(x + 1.31, centre + up, name, ha="center", va="center", fontsize=8.5, color=INK)
                axes.text(x + 1.31, centre - 0.12, what, ha="center", va="center", fontsize=7.5, color=FAINT)
        top -= height
        if number < len(ROOMS) - 1:
            axes.annotate("", (width / 2, top - gap + 0.03), (width / 2, top - 0.03), arrowprops={"arrowstyle": "->"})
            axes.text(width / 2 + 0.12, top - gap / 2, "imports", va="center", fontsize=8, color=FAINT)
            top -= gap
    return figure


def way() -> Figure:
    """The steps of one sparsely activated layer, with the files that hold them: to the right, down, and back."""
    width, height, gap = 2.2, 1.5, 0.4
    figure, axes = blank(0.2 + 3 * width + 2 * gap, 0.2 + 2 * height + gap)
    corners = [(0.1 + column * (width + gap), 0.1 + height + gap) for column in range(3)]
    corners += [(x, 0.1) for x, _ in reversed(corners)]
    for number, ((name, what, where), (x, y)) in enumerate(zip(WAY, corners, strict=True)):
        box(axes, x, y, width, height, GREEN if name == "module" else ORANGE)
        texts = ((1.28, name, 11.0, INK, "bold"), (0.86, what, 8.0, INK, "normal"), (0.34, where, 8.0, FAINT, "normal"))
        for up, text, size, colour, weight in texts:
            place = {"ha": "center", "va": "center", "fontsize": size, "color": colour, "weight": weight}
            axes.text(x + width / 2, y + up, text, **place)
        if number:
            before = corners[number - 1]
            right, down = (x > before[0]) - (x < before[0]), y < before[1]
            start = (before[0] + width / 2 * (1 + right), before[1] + (0 if down else height / 2))
            end = (x + width / 2 * (1 - right), y + (height if down else height / 2))
            axes.annotate("", end, start, arrowprops={"arrowstyle": "->"})
    return figure


if __name__ == "__main__":
    matplotlib.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "rooms"})
    for name, figure in {"rooms": rooms(), "way_of_a_tensor": way()}.items():
        figure.savefig(STATIC / f"{name}.svg", metadata={"Date": None})
