"""Images in idx files: what the reader gives, and what it refuses."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from sma.errors import DataError
from sma_models.training.data import idx
from sma_models.training.data.testing import Broken, DataSuite


class TestIdx(DataSuite):
    config = idx.IdxData.Config()
    refused = (("std", 0.0), ("validation_fraction", 1.0))
    broken = (
        Broken("train-images-idx3-ubyte", b"PNG", "must begin with 00 00 08 03 .*, got 50 4e 47"),
        Broken("t10k-labels-idx1-ubyte", None, "must contain t10k-labels-idx1-ubyte .*, got no such file", "release|."),
    )

    def write(self, root: Path) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, 30 * 16, dtype=np.uint8).tobytes()
        images = {"train_images_idx3": idx_bytes(20, 4, 4, content=pixels[: 20 * 16])}
        write_idx(root, **images, t10k_images_idx3=idx_bytes(10, 4, 4, content=pixels[20 * 16 :]))


def idx_bytes(*shape: int, content: bytes | None = None, kind: int = 8) -> bytes:
    body = bytes(index % 10 for index in range(int(np.prod(shape)))) if content is None else content
    return struct.pack(f">HBB{len(shape)}I", 0, kind, len(shape), *shape) + body


def write_idx(folder: Path, **replace: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files = {"train-images-idx3": idx_bytes(20, 4, 4), "train-labels-idx1": idx_bytes(20)}
    files |= {"t10k-images-idx3": idx_bytes(10, 4, 4), "t10k-labels-idx1": idx_bytes(10)}
    for name, content in {**files, **{key.replace("_", "-"): value for key, value in replace.items()}}.items():
        (folder / f"{name}-ubyte").write_bytes(content)


@pytest.mark.parametrize("compressed", [False, True])
def test_idx_files_are_read_plain_and_compressed(tmp_path: Path, compressed: bool) -> None:
    write_idx(tmp_path / "mnist")
    if compressed:
        for path in sorted((tmp_path / "mnist").iterdir()):
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    splits = idx.load(tmp_path, mean=0.5, std=0.25)
    assert (len(splits.train), len(splits.validation or []), len(splits.test)) == (18, 2, 10)
    assert splits.max_length == 16
    assert splits.test[3]["label"] == 3
    expected = (torch.arange(48, 64) % 10 / 255 - 0.5) / 0.25
    torch.testing.assert_close(splits.test[3]["values"], expected)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    # mtime=0: with the time of day in it, every worker of pytest-xdist would collect another name.
    [
        ("train_images_idx3", b"", "must hold data"),
        ("train_images_idx3", b"PNG", "must begin with 00 00 08 03 .* got 50 4e 47"),
        ("train_images_idx3", idx_bytes(20, 4, 4, kind=13), "must begin with 00 00 08 03 .* got 00 00 0d 03"),
        ("train_images_idx3", idx_bytes(20), "must begin with 00 00 08 03 .* got 00 00 08 01"),
        ("train_images_idx3", idx_bytes(20, 4, 4)[:9], "must state 3 sizes, got 5 bytes of them"),
        ("train_images_idx3", idx_bytes(20, 4, 4)[:-1], "must hold the 320 bytes of shape .* got 319 bytes"),
        ("train_images_idx3", idx_bytes(20, 4, 4) + b"x", "must hold the 320 bytes of shape .* got more"),
        ("train_images_idx3", idx_bytes(2**31, 2**16, 2**16, content=b"x"), "must hold the .* got 1 bytes"),
        ("train_images_idx3", idx_bytes(0, 4, 4), "must hold data, got shape"),
        ("train_images_idx3", gzip.compress(idx_bytes(20, 4, 4), mtime=0)[:-9], "must be a whole gzip file"),
        ("train_images_idx3", gzip.compress(idx_bytes(20, 4, 4), mtime=0)[:-4] + b"1234", "must be a whole gzip file"),
        ("train_labels_idx1", idx_bytes(19), "must have a label for each of the 20 images, got 19 labels"),
        ("train_labels_idx1", idx_bytes(20, content=bytes(19) + b"\x0b"), "row 19: the label must be below 10, got 11"),
        ("t10k_images_idx3", idx_bytes(10, 5, 4), "test images must have 16 pixels .* got 20"),
    ],
)
def test_bad_idx_files_are_refused(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    write_idx(tmp_path, **{file: content})
    with pytest.raises(DataError, match=message):
        idx.load(tmp_path)


def test_missing_idx_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must contain train-images-idx3-ubyte or the same with"):
        idx.load(tmp_path)
