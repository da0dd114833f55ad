"""CIFAR-10 (binary version) in grey, pixel by pixel (Krizhevsky 2009)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sma_models.training.data.base import ReleasedData, Task, classification
from sma_models.training.data.labelled import Bytes, PixelDataset, Splits, set_aside
from sma_models.training.data.reading import Pathlike, check_labels, find_folder, read_bytes, reject
from sma_models.training.data.release import Release, Resource

RELEASE = Release(
    name="image",
    folder="cifar-10-batches-bin",
    resources=(
        Resource(
            url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            known_hash="md5:c32a1d4ab5d03f1284b67883e8d87530",
            unpack="tar",
            top="cifar-10-batches-bin",
        ),
    ),
    licence="none stated; its makers ask to cite Krizhevsky 2009",
)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST = "test_batch.bin"
PLACES = (".", "cifar-10-batches-bin")
ROWS = 10_000
_ROW = 1 + 3 * 32 * 32


def luma(rgb: Bytes) -> Bytes:
    """Grey values by the luma transform of ITU-R 601-2, 0.299 R + 0.587 G + 0.114 B, to the nearest of 256 levels.

    Args:
        rgb: (..., 3, L) uint8, a plane for each colour.

    Returns:
        (..., L) uint8. Sixteen-bit fixed point, the integers of the usual image libraries.
    """
    red, green, blue = (rgb[..., channel, :].astype(np.uint32) for channel in range(3))
    grey = (red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16
    return grey.astype(np.uint8)


def read(path: Pathlike, rows: int | None = ROWS) -> tuple[Bytes, NDArray[np.int64]]:
    """Read one file of the binary version: rows of one label byte and 3 x 1,024 colour bytes.

    Args:
        path: the file.
        rows: how many rows it must have (10,000 in the release); None accepts any number.

    Returns:
        Grey pixels (N, 1024) uint8, row by row, and labels (N,).

    Raises:
        DataError: missing, empty, not a whole number of rows, not ``rows`` rows, or a label above 9.
    """
    content = read_bytes(path)
    if len(content) % _ROW:
        reject(path, f"the size must be a multiple of {_ROW} bytes (1 label + 3072 pixels)", f"{len(content)} bytes")
    if rows is not None and len(content) != rows * _ROW:
        reject(path, f"must hold {rows} rows of {_ROW} bytes", f"{len(content) // _ROW} rows")
    table = np.frombuffer(content, dtype=np.uint8).reshape(-1, _ROW)
    labels = table[:, 0].astype(np.int64)
    check_labels(path, labels, len(CLASSES))
    return luma(table[:, 1:].reshape(-1, 3, 1024)), labels


def load(
    root: Pathlike,
    *,
    validation_fraction: float = 0.1,
    seed: int = 0,
    mean: float = 0.48,
    std: float = 0.24,
    rows: int | None = ROWS,
) -> Splits[PixelDataset]:
    """CIFAR-10 in grey, 1,024 values an image, (x - mean) / std with x in [0, 1].

    Args:
        root: ``cifar-10-batches-bin`` or the folder around it.
        validation_fraction: share of the training images set aside; 0 gives no validation.
        seed: decides which ones.
        mean: the paper's normalisation.
        std: the paper's normalisation.
        rows: rows in each file, see :func:`read`.

    Raises:
        ConfigError: the fraction is out of range.
        DataError: see :func:`read`.
    """
    folder = find_folder(root, PLACES, TRAIN[0])
    parts = [read(folder / name, rows) for name in TRAIN]
    pixels, labels = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
    whole = PixelDataset(pixels, labels, len(CLASSES), mean, std)
    train, validation = set_aside(whole, validation_fraction, seed)
    test = PixelDataset(*read(folder / TEST, rows), len(CLASSES), mean, std)
    return Splits(train=train, validation=validation, test=test, max_length=1024, classes=CLASSES)


class ImageData(ReleasedData):
    """CIFAR-10 in grey, pixel by pixel."""

    release = RELEASE

    @dataclass(kw_only=True, frozen=True)
    class Config(ReleasedData.Config):
        """``rows`` is the number of images in each file; None accepts any."""

        validation_fraction: float = 0.1
        seed: int = 0
        mean: float = 0.48
        std: float = 0.24
        rows: int | None = ROWS

        def __post_init__(self) -> None:
            self.require(self.std > 0, "std", "must be positive")

    config: Config

    def open(self, *, seed: int) -> Task:
        c = self.config
        return classification(
            load(
                self.prepare(),
                validation_fraction=c.validation_fraction,
                seed=c.seed,
                mean=c.mean,
                std=c.std,
                rows=c.rows,
            )
        )
