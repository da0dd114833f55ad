"""Spoken words: what the reader gives, and what it refuses."""

from __future__ import annotations

import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sma.errors import ConfigError, DataError
from sma_models.training.data import speech
from sma_models.training.data.testing import Broken, DataSuite


def write_wav(
    path: Path, samples: int = 16000, rate: int = 16000, width: int = 2, channels: int = 1, seed: int = 0
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = np.random.default_rng(seed).integers(0, 256, samples * width * channels, dtype=np.uint8).tobytes()
    with wave.open(str(path), "wb") as file:
        file.setframerate(rate)
        file.setsampwidth(width)
        file.setnchannels(channels)
        file.writeframes(content)


def write_speech(root: Path) -> None:
    """Two classes of six recordings in the layout of Speech Commands, and a folder of noise that is no class."""
    lengths = [16000, 16000, 12000, 20000, 16000, 16000]
    for label, name in enumerate(("no", "yes")):
        for number, samples in enumerate(lengths):
            write_wav(root / name / f"{number}.wav", samples, seed=number + len(lengths) * label)
    write_wav(root / "_background_noise_" / "hum.wav", 40000)
    (root / "validation_list.txt").write_text("no/0.wav\nyes/0.wav\n")
    (root / "testing_list.txt").write_text("no/1.wav\nyes/1.wav\n")


class TestSpeech(DataSuite):
    config = speech.SpeechData.Config(classes=("no", "yes"), length=400)
    refused = (("length", 0), ("classes", ("yes", "yes")))
    broken = (
        Broken("yes/4.wav", b"", "must be an uncompressed WAV file, got a file that ends too early"),
        Broken("validation_list.txt", b"no/9.wav\n", r"must list files that exist, got no/9\.wav"),
        Broken("testing_list.txt", b"0.wav\n", r"line 1: must be <class>/<file>\.wav, got 0\.wav"),
    )

    def write(self, root: Path) -> None:
        write_speech(root)


@pytest.fixture
def wav() -> Callable[..., None]:
    return write_wav


def test_recordings_have_one_length(speech_root: Path) -> None:
    splits = speech.load(speech_root.parent)
    assert splits.classes == ("no", "yes")
    assert splits.validation is not None
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (8, 2, 2)
    assert splits.train.class_counts().tolist() == [4, 4]
    items = [splits.train[i] for i in range(8)]
    assert all(item["values"].shape == (16000,) and item["values"].dtype == torch.float32 for item in items)
    assert all(float(item["values"].min()) >= -1.0 and float(item["values"].max()) < 1.0 for item in items)
    with wave.open(str(speech_root / "no/2.wav")) as file:
        raw = np.frombuffer(file.readframes(12000), "<i2") / 32768
    short = items[0]["values"].numpy()
    np.testing.assert_array_equal(short[:12000], raw.astype(np.float32))
    assert not short[12000:].any()


def test_some_classes_can_be_chosen(speech_root: Path, wav: Callable[..., None]) -> None:
    wav(speech_root / "maybe/0.wav")
    splits = speech.load(speech_root, classes=("yes", "no"), length=100)
    assert splits.classes == ("yes", "no")
    assert splits.train[0]["label"] == 0
    assert splits.train[0]["values"].shape == (100,)
    with pytest.raises(ConfigError, match="classes: must name each class once"):
        speech.load(speech_root, classes=("yes", "yes"))
    with pytest.raises(DataError, match=r"must contain a folder for each of classes .*maybe, no, yes.*got no perhaps"):
        speech.load(speech_root, classes=("perhaps",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 8000}, "must have 16000 Hz, 16 bit, 1 channel, got 8000 Hz, 16 bit, 1 channel"),
        ({"width": 1}, "got 16000 Hz, 8 bit, 1 channel"),
        ({"channels": 2}, "got 16000 Hz, 16 bit, 2 channel"),
        ({"samples": 0}, "must hold samples, got none"),
    ],
)
def test_other_kinds_of_recordings_are_refused(
    speech_root: Path, wav: Callable[..., None], options: dict[str, Any], message: str
) -> None:
    wav(speech_root / "yes/4.wav", **options)
    with pytest.raises(DataError, match=rf"4\.wav: .*{message}"):
        speech.load(speech_root)


def test_broken_recordings_are_refused(speech_root: Path) -> None:
    path = speech_root / "yes/4.wav"
    whole = path.read_bytes()
    for content, message in (
        (whole[:-2], "must hold the 16000 samples that its header states"),
        (whole[:20], "must be an uncompressed WAV file"),
        (b"", "must be an uncompressed WAV file, got a file that ends too early"),
        (b"ID3" + whole[3:], "must be an uncompressed WAV file"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"4\.wav: {message}"):
            speech.load(speech_root)
    splits = speech.load(speech_root, check=False)
    with pytest.raises(DataError, match=r"4\.wav"):
        [splits.train[i] for i in range(len(splits.train))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"validation_list\.txt: must hold data"),
        ("no/0.wav\nno/9.wav\n", r"validation_list\.txt: must list files that exist, got no/9\.wav"),
        ("no/0.wav\nno/1.wav\n", r"testing_list\.txt: line 1: a file must be listed once, got no/1\.wav"),
        ("0.wav\n", r"validation_list\.txt: line 1: must be <class>/<file>\.wav, got 0\.wav"),
    ],
)
def test_bad_lists_are_refused(speech_root: Path, content: str, message: str) -> None:
    (speech_root / "validation_list.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        speech.load(speech_root)
