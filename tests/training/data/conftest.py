"""Tiny releases in the official layouts, and the place of the real ones, if any."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.training.data.test_image import write_cifar
from tests.training.data.test_speech import write_speech
from tests.training.data.test_text import write_reviews


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """The folder around ``aclImdb``."""
    write_reviews(tmp_path)
    return tmp_path


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """The folder around ``cifar-10-batches-bin``."""
    write_cifar(tmp_path)
    return tmp_path


@pytest.fixture
def speech_root(tmp_path: Path) -> Path:
    """The folder of the class folders."""
    root = tmp_path / "speech_commands"
    write_speech(root)
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
