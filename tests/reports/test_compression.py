"""The baselines of compression: a proper probability model, and the compressors as the commands run them."""

from __future__ import annotations

import math
import random
import subprocess
import time
from collections import Counter
from shutil import which

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sma.errors import DataError
from sma_models.reports import TrigramModel, baselines, gzip_bits_per_byte, xz_bits_per_byte
from sma_models.reports import compression as module

TEXT = b"the quick brown fox jumps over the lazy dog; the dog sleeps. " * 3


def slow_probability(training: bytes, context: bytes, byte: int) -> float:
    """Witten-Bell by its definition, with nothing but a counter."""
    counts = Counter(
        training[i + len(context)]
        for i in range(len(training) - len(context))
        if training[i : i + len(context)] == context
    )
    shorter = slow_probability(training, context[1:], byte) if context else 1 / 256
    total, kinds = sum(counts.values()), len(counts)
    return (counts[byte] + kinds * shorter) / (total + kinds) if kinds else shorter


@settings(max_examples=5)
@given(st.binary(min_size=1, max_size=60), st.binary(max_size=3))
def test_probabilities_sum_to_one_and_are_positive(training: bytes, context: bytes) -> None:
    probabilities = TrigramModel.fit(training).probabilities(context)
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)
    assert (probabilities > 0).all()


def test_every_context_of_a_real_text_is_normalised() -> None:
    model = TrigramModel.fit(TEXT)
    seen = {TEXT[i : i + 2] for i in range(len(TEXT) - 1)} | {b"", b"t", b"zq", b"\x00\xff", b"q\x00"}
    for context in sorted(seen):
        assert model.probabilities(context).sum() == pytest.approx(1, abs=1e-12)


def test_agrees_with_the_definition() -> None:
    model = TrigramModel.fit(TEXT)
    for context in (b"", b"t", b"\xff", b"th", b"g;", b"zz", b"\xffe"):
        expected = [slow_probability(TEXT, context, byte) for byte in range(256)]
        np.testing.assert_allclose(model.probabilities(context), expected, rtol=1e-12)
    held_out = b"the fox \xff sleeps\nover"
    bits = [-math.log2(slow_probability(TEXT, held_out[max(i - 2, 0) : i], c)) for i, c in enumerate(held_out)]
    assert model.bits_per_byte(held_out) == pytest.approx(sum(bits) / len(bits), rel=1e-12)


def test_pieces_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = TrigramModel.fit(TEXT)
    bits = whole.bits_per_byte(TEXT)
    monkeypatch.setattr(module, "_CHUNK", 3)
    pieces = TrigramModel.fit(TEXT)
    assert np.array_equal(pieces.trigrams, whole.trigrams)
    assert int(pieces.trigrams.sum()) == len(TEXT) - 2
    assert whole.bits_per_byte(TEXT) == pytest.approx(bits, rel=1e-12)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_shortest_data(length: int) -> None:
    bits = TrigramModel.fit(TEXT[:length]).bits_per_byte(TEXT[:length])
    assert 0 < bits < 8


def test_noise_costs_eight_bits_and_repetition_next_to_none() -> None:
    noise = random.Random(0).randbytes(20_000)
    figures = baselines(TEXT, noise)
    assert list(figures) == ["gzip -9", "xz -9", "byte trigrams"]
    assert all(bits > 7.9 for bits in figures.values())
    assert all(bits < 1 for bits in baselines(b"ab" * 5000, b"ab" * 5000).values())


@pytest.mark.parametrize(("command", "function"), [("gzip", gzip_bits_per_byte), ("xz", xz_bits_per_byte)])
def test_compressors_agree_with_the_commands(command: str, function: object) -> None:
    if which(command) is None:
        pytest.skip(f"the command {command} is not installed")
    data = random.Random(0).randbytes(2000) + TEXT * 20
    size = len(subprocess.run([command, "-9", "-c"], input=data, capture_output=True, check=True).stdout)
    assert callable(function)
    # Headers and the choice between equal matches differ by a few bytes from one implementation to the next.
    assert function(data) * len(data) / 8 == pytest.approx(size, abs=40)


def test_no_data_is_an_error() -> None:
    with pytest.raises(DataError, match="training data must hold at least one byte"):
        TrigramModel.fit(b"")
    with pytest.raises(DataError, match="data must hold at least one byte"):
        TrigramModel.fit(b"a").bits_per_byte(b"")
    for function in (gzip_bits_per_byte, xz_bits_per_byte):
        with pytest.raises(DataError, match="at least one byte"):
            function(b"")


def test_a_megabyte_is_a_matter_of_a_second() -> None:
    training = np.random.default_rng(0).integers(0, 256, 1_000_000, dtype=np.uint8).tobytes()
    start = time.process_time()
    TrigramModel.fit(training).bits_per_byte(training[:100_000])
    assert time.process_time() - start < 5
