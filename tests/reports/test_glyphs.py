"""Any byte can be shown."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sma.errors import RoutingError
from sma_models.reports.channels import channels, short_labels
from sma_models.reports.glyphs import glyphs
from tests.reports.conftest import MakeRoutings


@given(st.binary(max_size=80) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "ignore")))
def test_one_harmless_glyph_per_byte(data: bytes) -> None:
    shown = glyphs(data)
    assert len(shown) == len(data)
    for glyph in shown:
        assert glyph.text
        assert all(unicodedata.category(character)[0] != "C" for character in glyph.text)


@given(st.text(st.characters(categories=["L", "N", "P", "S"]), max_size=40))
def test_visible_text_reads_as_itself(text: str) -> None:
    shown = glyphs(text.encode())
    assert "".join(glyph.text for glyph in shown if glyph.kind == "char") == text


@pytest.mark.parametrize(
    ("data", "texts", "kinds"),
    [
        (b"a b\n\t", ["a", " ", "b", "↵", "→"], ["char", "space", "char", "space", "space"]),
        (b"\x00\x1b\r\x7f", ["^@", "^[", "^M", "^?"], ["control"] * 4),
        ("é".encode(), ["é", "·"], ["char", "continuation"]),
        ("\u202e".encode(), ["U+202E", "·", "·"], ["control", "continuation", "continuation"]),
        (b"\xc3", [r"\xc3"], ["invalid"]),
        (b"\xc3(", [r"\xc3", "("], ["invalid", "char"]),
        (b"\xa9\xff", [r"\xa9", r"\xff"], ["invalid", "invalid"]),
        (b"\xed\xa0\x80", [r"\xed", r"\xa0", r"\x80"], ["invalid"] * 3),
        (b"\xf0\x9f\x98", [r"\xf0", r"\x9f", r"\x98"], ["invalid"] * 3),
        ("\u0301".encode(), ["\u25cc\u0301", "·"], ["char", "continuation"]),
    ],
)
def test_kinds_of_bytes(data: bytes, texts: list[str], kinds: list[str]) -> None:
    shown = glyphs(data)
    assert [glyph.text for glyph in shown] == texts
    assert [glyph.kind for glyph in shown] == kinds


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["layers.0.activate", "layers.1.activate"], ["layer 0", "layer 1"]),
        (["layers.0.sublayers.1.activate", "layers.1.sublayers.1.mixture"], ["layer 0", "layer 1"]),
        (["layers.0.sublayers.1.activate", "layers.0.x"], ["layer 0 sublayers.1", "layer 0 x"]),
        (["first.layers.0.activate", "second.layers.0.activate"], ["first layer 0", "second layer 0"]),
        (["mine", "layers.0.activate"], ["mine", "layer 0"]),
        (["layers.0.a.activate", "layers.0.a.mixture"], ["layers.0.a.activate", "layers.0.a.mixture"]),
    ],
)
def test_labels_are_short_and_unique(names: list[str], labels: list[str]) -> None:
    assert short_labels(names) == labels


def test_channels_drop_padding_and_split_modules(make_routings: MakeRoutings) -> None:
    routings = make_routings(10, n_layers=2, n_modules=2, batch=3, padding=4)
    found = channels(10, routings, sample=2)
    assert [channel.label for channel in found] == [f"layer {i} module {m}" for i in range(2) for m in range(2)]
    expected = routings["layers.1.activate"]
    np.testing.assert_array_equal(found[3].active, expected.active[2, 4:, 1].numpy())
    np.testing.assert_array_equal(found[3].confidence, expected.confidence[2, 4:, 1].numpy())
    assert found[3].rate == pytest.approx(float(expected.rate()[2, 1]))


def test_channels_refuse_what_does_not_fit(make_routings: MakeRoutings) -> None:
    with pytest.raises(RoutingError, match="at least one layer"):
        channels(3, {})
    with pytest.raises(RoutingError, match=r"sample must lie in 0\.\.0, got 1"):
        channels(3, make_routings(3), sample=1)
    with pytest.raises(RoutingError, match="3 real tokens, the text has 4 bytes"):
        channels(4, make_routings(3, padding=1))
