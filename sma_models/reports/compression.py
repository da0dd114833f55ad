"""Baselines for a language model of bytes: two compressors, and counts of three bytes in a row."""

from __future__ import annotations

import gzip
import lzma
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sma.errors import DataError

_CHUNK = 1 << 20


def gzip_bits_per_byte(data: bytes) -> float:
    """Bits per byte of ``gzip -9``, its header included.

    Raises:
        DataError: no data.
    """
    return 8 * len(gzip.compress(_some(data, "data"), 9, mtime=0)) / len(data)


def xz_bits_per_byte(data: bytes) -> float:
    """Bits per byte of ``xz -9``, its header included.

    Raises:
        DataError: no data.
    """
    return 8 * len(lzma.compress(_some(data, "data"), preset=9)) / len(data)


def _some(data: bytes, name: str) -> bytes:
    if not data:
        raise DataError(f"baselines: {name} must hold at least one byte, got none")
    return data


@dataclass(frozen=True)
class TrigramModel:
    """Predicts a byte from the two before it, from counts with Witten-Bell smoothing (Witten and Bell 1991, method C).

    ``p(c | a b) = (n(a b c) + T(a b) p(c | b)) / (n(a b) + T(a b))``, where T counts the different bytes seen after a
    context; ``p(c | b)`` is made of pairs and ``p(c)`` in the same way, and ``p(c)`` of single bytes and the uniform
    ``1 / 256``. A context never seen leaves the decision to the shorter one. Probabilities are positive and sum to 1.

    Attributes:
        trigrams: ``(256 * 256, 256)`` uint32 counts ``n(a b c)``.
        totals: ``(256 * 256,)`` ``n(a b)``, as a context.
        kinds: ``(256 * 256,)`` ``T(a b)``.
        shorter: ``(256, 256)`` ``p(c | b)``.
        shortest: ``(256,)`` ``p(c)``.
    """

    trigrams: npt.NDArray[np.uint32]
    totals: npt.NDArray[np.float64]
    kinds: npt.NDArray[np.float64]
    shorter: npt.NDArray[np.float64]
    shortest: npt.NDArray[np.float64]

    @staticmethod
    def fit(data: bytes) -> TrigramModel:
        """Count ``data``; seconds for tens of megabytes, and 64 MiB to keep.

        Raises:
            DataError: no data.
        """
        values = np.frombuffer(_some(data, "training data"), np.uint8)
        trigrams = _count(values)
        # Pairs and single bytes are counted over the whole data, not summed from the triples: short data counts too.
        pairs = np.bincount(values[:-1].astype(np.int64) * 256 + values[1:], minlength=1 << 16).reshape(256, 256)
        shortest = _smooth(np.bincount(values, minlength=256).astype(np.float64)[None], np.full(256, 1 / 256))[0]
        return TrigramModel(
            trigrams,
            trigrams.sum(1, dtype=np.float64),
            np.count_nonzero(trigrams, axis=1).astype(np.float64),
            _smooth(pairs.astype(np.float64), shortest),
            shortest,
        )

    def probabilities(self, context: bytes) -> npt.NDArray[np.float64]:
        """``(256,)`` probabilities of the byte after ``context``, of which the last two bytes count."""
        if not context:
            return self.shortest.copy()
        shorter: npt.NDArray[np.float64] = self.shorter[context[-1]].copy()
        row = context[-2] * 256 + context[-1] if len(context) > 1 else 0
        weight = float(self.kinds[row]) if len(context) > 1 else 0.0
        return (self.trigrams[row] + weight * shorter) / (float(self.totals[row]) + weight) if weight else shorter

    def bits_per_byte(self, data: bytes) -> float:
        """Mean of ``-log2 p(byte | the two before it)`` over ``data``; its first two bytes have shorter contexts.

        Raises:
            DataError: no data.
        """
        values = np.frombuffer(_some(data, "data"), np.uint8).astype(np.int64)
        bits = -float(np.log2(self.shortest[values[0]]))
        if len(values) > 1:
            bits -= float(np.log2(self.shorter[values[0], values[1]]))
        for start in range(0, max(len(values) - 2, 0), _CHUNK):
            part = values[start : start + _CHUNK + 2]
            bits -= float(np.log2(self._likelihood(part[:-2], part[1:-1], part[2:])).sum())
        return bits / len(values)

    def _likelihood(
        self, a: npt.NDArray[np.int64], b: npt.NDArray[np.int64], c: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float64]:
        """``(n,)`` of ``p(c | a b)``."""
        row = a * 256 + b
        weight = self.kinds[row]
        shorter: npt.NDArray[np.float64] = self.shorter[b, c]
        mixed: npt.NDArray[np.float64] = (self.trigrams[row, c] + weight * shorter) / np.maximum(
            self.totals[row] + weight, 1
        )
        return np.where(weight > 0, mixed, shorter)


def _count(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint32]:
    """``(256 * 256, 256)`` counts of three bytes in a row."""
    # In chunks: the indices of 16 million bytes already take some 400 MB.
    counts = np.zeros(1 << 24, np.uint32)
    chunk = 16 * _CHUNK
    for start in range(0, max(len(values) - 2, 0), chunk):
        part = values[start : start + chunk + 2].astype(np.int32)
        index = (part[:-2] << 16) | (part[1:-1] << 8) | part[2:]
        counts += np.bincount(index, minlength=1 << 24).astype(np.uint32)
    return counts.reshape(1 << 16, 256)


def _smooth(counts: npt.NDArray[np.float64], shorter: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Witten-Bell for ``(contexts, 256)`` counts over the probabilities ``(256,)`` of the shorter context."""
    kinds = np.count_nonzero(counts, axis=1, keepdims=True)
    mixed = (counts + kinds * shorter) / np.maximum(counts.sum(1, keepdims=True) + kinds, 1)
    return np.where(kinds > 0, mixed, shorter)


def baselines(training: bytes, held_out: bytes) -> dict[str, float]:
    """Bits per byte of ``held_out`` by ``gzip -9``, ``xz -9`` and a byte trigram model that was fitted to ``training``.

    The compressors see the held-out bytes only, and have to describe them from nothing; the trigram model may use all
    it learned, as a trained model does.

    Raises:
        DataError: one of the two is empty.
    """
    return {
        "gzip -9": gzip_bits_per_byte(held_out),
        "xz -9": xz_bits_per_byte(held_out),
        "byte trigrams": TrigramModel.fit(training).bits_per_byte(held_out),
    }
