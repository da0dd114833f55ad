"""Bytes to text as they come: characters when they are complete, nothing that may still become a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


def token_name(token: int) -> str:
    r"""What stands for a byte in the log-probabilities: the character, or ``bytes:\xNN`` beyond ASCII.

    Example:
        >>> token_name(65), token_name(0xE9)
        ('A', 'bytes:\\xe9')
    """
    return chr(token) if token < 0x80 else f"bytes:\\x{token:02x}"


def ends_with_stop(written: bytes | bytearray, stops: Sequence[bytes]) -> int:
    """How many bytes at the end of a text are a stop string, the longest if several are; 0 if none is."""
    return max((len(stop) for stop in stops if written.endswith(stop)), default=0)


def held_back(written: bytes | bytearray, stops: Sequence[bytes]) -> int:
    r"""How many bytes at the end of a text may be the beginning of a stop string, or all of one.

    Example:
        >>> held_back(b"one\n", [b"\n\n", b"end"])
        1
    """
    longest = 0
    for stop in stops:
        for size in range(min(len(stop), len(written)), longest, -1):
            if written.endswith(stop[:size]):
                longest = size
                break
    return longest


class Unfolding:
    """Text of bytes that come one at a time; what is no UTF-8 becomes U+FFFD.

    Attributes:
        characters: how many were given out.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.characters = 0

    def __call__(self, data: bytes, *, final: bool = False) -> str:
        """The characters that are complete now."""
        text = self._decoder.decode(data, final)
        self.characters += len(text)
        return text
