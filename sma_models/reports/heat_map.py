"""The text heat map: one HTML file that shows which bytes of a text activated which layer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np

from sma.errors import DataError
from sma.routing import Routing
from sma_models.reports.channels import Channel, channels
from sma_models.reports.glyphs import Glyph, glyphs

_LEVELS = 10  # steps of colour; the page's script counts the same
_OPACITY = 0.85  # of the strongest step, so that the text keeps its contrast


def text_heat_map(
    data: bytes,
    routings: Mapping[str, Routing],
    out: str | Path,
    *,
    title: str = "Which bytes activate",
    sample: int = 0,
) -> Path:
    """Write a self-contained page: the text, coloured by activation, with a choice of one layer or all together.

    Nothing is loaded from elsewhere. Pointing at a byte, or moving over the text with the arrow keys, shows its
    position and the decision and confidence of each layer. Any bytes will do: control characters and invalid UTF-8 are
    shown as symbols and numbers. Made for some thousand bytes: each is an element of the page, and browsers grow slow
    beyond 100,000.

    Args:
        data: the sequence, one token per byte.
        routings: as the model returned them.
        out: the HTML file.
        title: of the page; any text.
        sample: row of the batch that holds the sequence.

    Returns:
        The path of the file.

    Raises:
        DataError: no bytes.
        RoutingError: the routings are not of this text.
    """
    if not data:
        raise DataError("text_heat_map: data must hold at least one byte, got none")
    layers = channels(len(data), routings, sample)
    template = Template(files("sma_models.reports").joinpath("heat_map.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=escape(title),
        summary=f"{len(data):,} bytes, {len(layers)} {'layer' if len(layers) == 1 else 'layers'}. "
        "The stronger the colour, the more layers were active at the byte, or the surer the chosen layer was.",
        levels="\n".join(
            f".h{n} {{ background: rgb(var(--heat) / {_OPACITY * n / _LEVELS:.3f}); }}" for n in range(1, _LEVELS + 1)
        ),
        choices=_choices(layers),
        low="no layer",
        high="all layers",
        scale="".join(f'<span class="h{n}"></span>' for n in range(0, _LEVELS + 1, 2)),
        text=_text(glyphs(data), data, layers),
        data=_json(data, layers),
    )
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Characters that UTF-8 cannot write (half of a surrogate pair in a title) become a question mark.
    path.write_bytes(page.encode("utf-8", "replace"))
    return path


def _choices(layers: Sequence[Channel]) -> str:
    """Radio buttons: the keyboard and screen readers can use them."""
    entries = [("All layers, mean", sum(layer.rate for layer in layers) / len(layers))]
    entries += [(layer.label, layer.rate) for layer in layers]
    return "\n".join(
        f'<div class="choice"><input type="radio" name="layer" id="layer{n}" value="{n}"{" checked" if n < 0 else ""}>'
        f'<label for="layer{n}">{escape(label)} <small>{100 * rate:.0f} %</small></label></div>'
        for n, (label, rate) in enumerate(entries, -1)
    )


def _text(shown: Sequence[Glyph], data: bytes, layers: Sequence[Channel]) -> str:
    """One element per byte, in order, coloured for all layers together."""
    active = np.stack([layer.active for layer in layers]).sum(0)
    classes = {"char": "", "space": "dim ", "continuation": "dim ", "control": "odd ", "invalid": "odd "}
    parts = []
    for glyph, byte, count in zip(shown, data, active.tolist(), strict=True):
        kind = "" if byte == 0x20 else classes[glyph.kind]
        # The symbol makes the byte visible; the byte itself keeps the layout of the text.
        layout = chr(byte) if byte in b"\n\t" else ""
        parts.append(f'<span class="{kind}h{level(count / len(layers))}">{escape(glyph.text)}{layout}</span>')
    return "".join(parts)


def level(share: float) -> int:
    """Step of colour, 0 to 10, for the share of the layers that are active; the smallest share is already seen."""
    return math.ceil(_LEVELS * share)


def _json(data: bytes, layers: Sequence[Channel]) -> str:
    """What the script reads. Inside an element of the page "<" could end it, so it is written as an escape."""
    content = {
        "hex": data.hex(),
        "layers": [
            {
                "label": layer.label,
                "active": "".join("1" if active else "0" for active in layer.active.tolist()),
                "confidence": [round(c, 2) if math.isfinite(c) else None for c in layer.confidence.tolist()],
            }
            for layer in layers
        ],
    }
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
