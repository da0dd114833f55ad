"""CIFAR-10: what the reader gives, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sma.errors import DataError
from sma_models.training.data import image
from sma_models.training.data.testing import Broken, DataSuite


def write_cifar(root: Path) -> None:
    """Six files of 20 rows in the layout of the binary version of CIFAR-10."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]:
        rows = rng.integers(0, 256, (20, 3073), dtype=np.uint8)
        rows[:, 0] %= 10
        (folder / name).write_bytes(rows.tobytes())


class TestImage(DataSuite):
    config = image.ImageData.Config(rows=20)
    refused = (("std", 0.0), ("validation_fraction", -0.1))
    broken = (
        Broken("cifar-10-batches-bin/data_batch_3.bin", b"x", "must be a multiple of 3073 bytes .*, got 1 bytes"),
        Broken("cifar-10-batches-bin/test_batch.bin", bytes(3073), "must hold 20 rows of 3073 bytes, got 1 rows"),
        Broken("cifar-10-batches-bin/data_batch_5.bin", None, "must be a readable file, got No such file"),
    )

    def write(self, root: Path) -> None:
        write_cifar(root)


def test_luma_is_that_of_pillow() -> None:
    pillow = pytest.importorskip("PIL.Image", reason="compares with Pillow")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    expected = np.asarray(pillow.fromarray(pixels).convert("L"))
    found = image.luma(pixels.reshape(-1, 3).T[None])[0].reshape(64, 64)
    assert (found == expected).all()


def test_luma_of_pure_colours() -> None:
    colours = np.array([[255, 0, 0, 255, 0], [0, 255, 0, 255, 0], [0, 0, 255, 255, 0]], dtype=np.uint8)
    assert image.luma(colours).tolist() == [76, 150, 29, 255, 0]


def test_cifar10_becomes_grey_rows(cifar: Path) -> None:
    splits = image.load(cifar, rows=20, validation_fraction=0.1)
    assert (len(splits.train), len(splits.validation or []), len(splits.test)) == (90, 10, 20)
    row = np.frombuffer((cifar / "cifar-10-batches-bin/test_batch.bin").read_bytes(), np.uint8)[3073 : 2 * 3073]
    red, green, blue = row[1:].astype(np.float64).reshape(3, 1024)
    grey = (0.299 * red + 0.587 * green + 0.114 * blue) / 255
    item = splits.test[1]
    assert item["label"] == row[0]
    assert item["values"].dtype == torch.float32
    assert item["values"].shape == (1024,)
    np.testing.assert_allclose(item["values"].numpy() * 0.24 + 0.48, grey, atol=0.51 / 255)
    batch = splits.test.collate([splits.test[i] for i in range(3)])
    assert batch["values"] is not None
    assert batch["values"].shape == (3, 1024)
    assert batch["valid"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: b"", "must hold data, got an empty file"),
        (lambda content: content[:-1], "the size must be a multiple of 3073 bytes .* got 61459 bytes"),
        (lambda content: content[:-3073], "must hold 20 rows of 3073 bytes, got 19 rows"),
        (lambda content: content[:3073] + b"\x0a" + content[3074:], "row 1: the label must be below 10, got 10"),
    ],
)
def test_bad_cifar10_files_are_refused(cifar: Path, change: Callable[[bytes], bytes], message: str) -> None:
    path = cifar / "cifar-10-batches-bin/data_batch_3.bin"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=rf"data_batch_3\.bin: {message}"):
        image.load(cifar, rows=20)


def test_the_release_has_ten_thousand_rows_a_file(cifar: Path) -> None:
    with pytest.raises(DataError, match="must hold 10000 rows"):
        image.load(cifar)
    (cifar / "cifar-10-batches-bin/test_batch.bin").unlink()
    with pytest.raises(DataError, match=r"test_batch\.bin: must be a readable file, got No such file"):
        image.load(cifar, rows=20)
