"""Bytes to text as they come: a character is returned when all its bytes are there."""

from __future__ import annotations

import codecs


def token_name(token: int) -> str:
    r"""The name of a byte in the log-probabilities: the character, or ``bytes:\xNN`` beyond ASCII.

    Example:
        >>> token_name(65), token_name(0xE9)
        ('A', 'bytes:\\xe9')
    """
    return chr(token) if token < 0x80 else f"bytes:\\x{token:02x}"


class IncrementalText:
    """Text of bytes that come one at a time; bytes outside UTF-8 become U+FFFD.

    Attributes:
        characters: how many were returned.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.characters = 0

    def __call__(self, data: bytes, *, final: bool = False) -> str:
        """The characters that are complete now."""
        text = self._decoder.decode(data, final)
        self.characters += len(text)
        return text
