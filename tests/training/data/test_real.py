"""The readers on the real sets, where the environment variable SMA_DATA names a folder that has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sma_models.training.data import image, speech, text


def test_real_reviews(real_set: Callable[[str], Path]) -> None:
    splits = text.load(real_set("aclImdb"))
    assert (len(splits.train), len(splits.validation or []), len(splits.test)) == (22500, 2500, 25000)
    assert splits.test.class_counts().tolist() == [12500, 12500]
    assert splits.train.rows.lengths.max() == 4000


def test_real_images(real_set: Callable[[str], Path]) -> None:
    splits = image.load(real_set("cifar-10-batches-bin"))
    assert splits.test.class_counts().tolist() == [1000] * 10
    assert abs(splits.train.pixels.mean() / 255 - 0.48) < 0.005
    assert abs(splits.train.pixels.std() / 255 - 0.24) < 0.005


def test_real_speech(real_set: Callable[[str], Path]) -> None:
    splits = speech.load(real_set("speech_commands"))
    assert len(splits.train) > len(splits.test) > 0
    assert splits.train[0]["values"].shape == (16000,)
