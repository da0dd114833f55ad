"""How to show a byte: any byte, of any text or none."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Literal

Kind = Literal["char", "space", "control", "continuation", "invalid"]
_DOTTED_CIRCLE = "\u25cc"


@dataclass(frozen=True)
class Glyph:
    """What stands for one byte.

    Attributes:
        text: what to draw; never a control character, never one that changes its neighbours.
        kind: ``char`` a visible character, ``space`` a space, tab or line end, ``control`` a character without a
            picture of its own, ``continuation`` the second to fourth byte of a character, ``invalid`` no part of valid
            UTF-8.
    """

    text: str
    kind: Kind


_SPACES = {"\n": "\u21b5", "\t": "\u2192", " ": " "}


def glyphs(data: bytes) -> list[Glyph]:
    r"""One glyph per byte. The first byte of a character shows it, its other bytes show a dot.

    Example:
        >>> [glyph.text for glyph in glyphs("é!".encode() + bytes([255]))]
        ['é', '·', '!', '\\xff']
    """
    found: list[Glyph] = []
    while len(found) < len(data):
        start = len(found)
        character = _character(data, start)
        if character is None:
            found.append(Glyph(f"\\x{data[start]:02x}", "invalid"))
            continue
        found.append(_glyph(character))
        found.extend([Glyph("\u00b7", "continuation")] * (len(character.encode()) - 1))
    return found


def _character(data: bytes, start: int) -> str | None:
    """The character whose encoding begins at ``start``, None where there is none."""
    first = data[start]
    if first < 0x80:
        return chr(first)
    length = 2 if 0xC2 <= first < 0xE0 else 3 if 0xE0 <= first < 0xF0 else 4 if 0xF0 <= first < 0xF5 else 0
    try:
        return data[start : start + length].decode() or None
    except UnicodeDecodeError:
        return None


def _glyph(character: str) -> Glyph:
    if character in _SPACES:
        return Glyph(_SPACES[character], "space")
    code = ord(character)
    if code < 0x20 or code == 0x7F:
        # Caret notation, as terminals write it: few fonts have the pictures of control characters.
        return Glyph(f"^{chr(code ^ 0x40)}", "control")
    category = unicodedata.category(character)
    # Direction marks, zero-width and private characters, exotic spaces: a number is all that can be seen of them.
    if category[0] in "CZ":
        return Glyph(f"U+{code:04X}", "control")
    if category[0] == "M":
        return Glyph(_DOTTED_CIRCLE + character, "char")
    return Glyph(character, "char")
