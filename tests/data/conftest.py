"""Small files in the layouts of the official releases, made on the spot; and the place of the real ones, if any."""

from __future__ import annotations

import os
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


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


@pytest.fixture
def wav() -> Callable[..., None]:
    return write_wav


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """Two splits of 2 x 10 reviews, in the layout of aclImdb."""
    for split in ("train", "test"):
        for label in ("neg", "pos"):
            folder = tmp_path / "aclImdb" / split / label
            folder.mkdir(parents=True)
            for number in range(10):
                (folder / f"{number}_{number}.txt").write_text(f"{split} {label} " + "é" * number, encoding="utf-8")
    return tmp_path


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """Six files of 20 rows in the layout of the binary version of CIFAR-10."""
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]:
        rows = rng.integers(0, 256, (20, 3073), dtype=np.uint8)
        rows[:, 0] %= 10
        (folder / name).write_bytes(rows.tobytes())
    return tmp_path


@pytest.fixture
def speech_root(tmp_path: Path) -> Path:
    """Two classes of six recordings in the layout of Speech Commands, and a folder of noise that is no class."""
    root = tmp_path / "speech_commands"
    lengths = [16000, 16000, 12000, 20000, 16000, 16000]
    for name in ("no", "yes"):
        for number, samples in enumerate(lengths):
            write_wav(root / name / f"{number}.wav", samples, seed=number)
    write_wav(root / "_background_noise_" / "hum.wav", 40000)
    (root / "validation_list.txt").write_text("no/0.wav\nyes/0.wav\n")
    (root / "testing_list.txt").write_text("no/1.wav\nyes/1.wav\n")
    return root


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real, unpacked data sets that the environment variable SMA_DATA names."""
    place = os.environ.get("SMA_DATA")
    if not place:
        pytest.skip("SMA_DATA does not name a folder of real data sets")
    return Path(place)


@pytest.fixture
def real_set(real_data: Path) -> Callable[[str], Path]:
    def find(name: str) -> Path:
        if not (real_data / name).is_dir():
            pytest.skip(f"{real_data} has no {name}")
        return real_data / name

    return find
