"""Pathfinder: what the reader gives, and what it refuses."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest
import torch

from sma.errors import ConfigError, DataError, MissingExtraError
from sma_models.training.data import pathfinder
from sma_models.training.data.testing import Broken, DataSuite

FOLDER = "pathfinder32/curv_contour_length_14"


def write_pathfinder(root: Path, resolution: int = 32) -> None:
    """Two folders of ten images, each of one grey value, in the layout of Long Range Arena."""
    pillow = pytest.importorskip("PIL.Image", reason="reading Pathfinder needs Pillow")
    folder = root / f"pathfinder{resolution}/curv_contour_length_14"
    (folder / "metadata").mkdir(parents=True)
    for part in range(2):
        (folder / f"imgs/{part}").mkdir(parents=True)
        lines = []
        for number in range(10):
            grey = 20 * number + part
            pillow.new("L", (resolution, resolution), grey).save(folder / f"imgs/{part}/sample_{number}.png")
            lines.append(f"imgs/{part} sample_{number}.png {number} {number % 2} 1.0 14\n")
        (folder / f"metadata/{part}.npy").write_text("".join(lines))


class TestPathfinder(DataSuite):
    config = pathfinder.PathfinderData.Config()
    refused = (("std", 0.0), ("difficulty", "hard"), ("fractions", (0.5, 0.5)))
    broken = (
        Broken(f"{FOLDER}/metadata/0.npy", b"", "must hold data, got an empty file"),
        Broken(f"{FOLDER}/metadata/1.npy", b"imgs/1 sample_0.png 0 2\n", "line 1: must be <folder> .*, got imgs/1"),
        Broken(f"{FOLDER}/imgs/0/sample_0.png", b"no image", "must be a PNG image, got something else"),
    )

    def write(self, root: Path) -> None:
        write_pathfinder(root)


@pytest.fixture
def pathfinder_root(tmp_path: Path) -> Path:
    write_pathfinder(tmp_path)
    return tmp_path


def test_pathfinder_images_become_rows(pathfinder_root: Path) -> None:
    splits = pathfinder.load(pathfinder_root)
    assert splits.validation is not None
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (16, 2, 2)
    files = {str(part.files[i]) for part in (splits.train, splits.validation, splits.test) for i in part._index}
    assert len(files) == 20
    for i in range(len(splits.train)):
        item = splits.train[i]
        _, part, name = str(splits.train.files[splits.train._index[i]]).split("/")
        number = int(name.rpartition("_")[2].removesuffix(".png"))
        assert item["label"] == number % 2
        torch.testing.assert_close(item["values"], torch.full((1024,), ((20 * number + int(part)) / 255 - 0.5) / 0.5))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metadata/0.npy", b"", "0.npy: must hold data"),
        ("metadata/0.npy", b"\x93NUMPY\x01\x00\n", "0.npy: must be lines of text"),
        ("metadata/0.npy", b"imgs/0 sample_0.png 0\n", "line 1: must be <folder>"),
        ("metadata/0.npy", b"imgs/0 sample_0.png 0 2 1.0\n", "line 1: must be <folder> .* <label 0 or 1>"),
        ("metadata/0.npy", b"imgs/0 sample_99.png 0 1 1.0\n", "line 1: must name an image that exists, once"),
        ("metadata/0.npy", b"imgs/7 sample_0.png 0 1 1.0\n", "imgs/7: must be a readable folder"),
        ("imgs/0/sample_0.png", b"", "sample_0.png: must be a PNG image"),
        ("imgs/0/sample_0.png", b"no image", "sample_0.png: must be a PNG image"),
    ],
)
def test_bad_pathfinder_files_are_refused(pathfinder_root: Path, file: str, content: bytes, message: str) -> None:
    (pathfinder_root / "pathfinder32/curv_contour_length_14" / file).write_bytes(content)
    with pytest.raises(DataError, match=message):
        pathfinder.load(pathfinder_root)


def test_other_sizes_and_broken_images_are_refused(pathfinder_root: Path) -> None:
    path = pathfinder_root / "pathfinder32/curv_contour_length_14/imgs/0/sample_0.png"
    with pytest.raises(DataError, match=r"must be 128 x 128 pixels, got 32 x 32"):
        pathfinder.read_png(path, 128)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError, match=r"sample_0\.png: must be a (whole )?PNG image"):
        pathfinder.read_png(path, 32)
    with pytest.raises(ConfigError, match="difficulty: must be one of"):
        pathfinder.load(pathfinder_root, difficulty="hard")


def test_without_pillow_one_error_says_so(pathfinder_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_pillow(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "PIL":
            raise ImportError("No module named 'PIL'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pillow)
    with pytest.raises(MissingExtraError, match="needs Pillow"):
        pathfinder.load(pathfinder_root)
