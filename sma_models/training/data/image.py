"""Images as sequences of grey pixels: CIFAR-10 (binary version) and idx files in the manner of MNIST."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from sma_models.training.data.datasets import PixelDataset, Splits, set_aside
from sma_models.training.data.files import Pathlike, find_folder, read_bytes, reject

Bytes = NDArray[np.uint8]

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
CIFAR10_TEST = "test_batch.bin"
CIFAR10_PLACES = (".", "cifar-10-batches-bin")
CIFAR10_ROWS = 10_000
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


def read_cifar10(path: Pathlike, rows: int | None = CIFAR10_ROWS) -> tuple[Bytes, NDArray[np.int64]]:
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
    _check_labels(path, labels, len(CIFAR10_CLASSES))
    return luma(table[:, 1:].reshape(-1, 3, 1024)), labels


def _check_labels(path: Pathlike, labels: NDArray[np.int64], num_classes: int) -> None:
    if (labels >= num_classes).any():
        row = int((labels >= num_classes).argmax())
        reject(path, f"row {row}: the label must be below {num_classes}", int(labels[row]))


def load_cifar10(
    root: Pathlike,
    *,
    validation_fraction: float = 0.1,
    seed: int = 0,
    mean: float = 0.48,
    std: float = 0.24,
    rows: int | None = CIFAR10_ROWS,
) -> Splits[PixelDataset]:
    """CIFAR-10 in grey, 1,024 values an image, (x - mean) / std with x in [0, 1].

    Args:
        root: ``cifar-10-batches-bin`` or the folder around it.
        validation_fraction: share of the training images set aside; 0 gives no validation.
        seed: decides which ones.
        mean: the paper's normalisation.
        std: the paper's normalisation.
        rows: rows in each file, see :func:`read_cifar10`.

    Raises:
        ConfigError: the fraction is out of range.
        DataError: see :func:`read_cifar10`.
    """
    folder = find_folder(root, CIFAR10_PLACES, CIFAR10_TRAIN[0])
    parts = [read_cifar10(folder / name, rows) for name in CIFAR10_TRAIN]
    pixels, labels = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
    whole = PixelDataset(pixels, labels, len(CIFAR10_CLASSES), mean, std)
    train, validation = set_aside(whole, validation_fraction, seed)
    test = PixelDataset(*read_cifar10(folder / CIFAR10_TEST, rows), len(CIFAR10_CLASSES), mean, std)
    return Splits(train=train, validation=validation, test=test, max_length=1024, classes=CIFAR10_CLASSES)


def read_idx(path: Pathlike, dimensions: int) -> Bytes:
    """Read an idx file of unsigned bytes, plain or compressed with gzip (told by its content, not its name).

    The header is two zero bytes, 0x08, the number of dimensions, then each size as a big-endian 32-bit integer.

    Args:
        path: the file.
        dimensions: how many it must have: 3 for images, 1 for labels.

    Returns:
        uint8, of the shape that the header states.

    Raises:
        DataError: missing, empty, another header, fewer or more bytes than the header states, broken gzip.
    """
    compressed = read_bytes(path)[:2] == b"\x1f\x8b"
    try:
        with gzip.open(path, "rb") if compressed else open(path, "rb") as file:
            return _read_idx(path, file, dimensions)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        reject(path, "must be a whole gzip file", str(error))


def _read_idx(path: Pathlike, file: IO[bytes] | gzip.GzipFile, dimensions: int) -> Bytes:
    magic = file.read(4)
    if magic != bytes([0, 0, 8, dimensions]):
        reject(path, f"must begin with 00 00 08 {dimensions:02x} (idx, unsigned bytes)", magic.hex(" "))
    header = file.read(4 * dimensions)
    if len(header) < 4 * dimensions:
        reject(path, f"must state {dimensions} sizes", f"{len(header)} bytes of them")
    shape = struct.unpack(f">{dimensions}I", header)
    size = int(np.prod(shape, dtype=np.uint64))
    if not size:
        reject(path, "must hold data", f"shape {shape}")
    # Read piece by piece: a header that lies must not reserve the memory it claims.
    pieces, missing = [], size
    while missing and (piece := file.read(min(missing, 1 << 24))):
        pieces.append(piece)
        missing -= len(piece)
    if missing or file.read(1):
        held = f"{size - missing} bytes" if missing else "more"
        reject(path, f"must hold the {size} bytes of shape {shape} that its header states", held)
    return np.frombuffer(b"".join(pieces), dtype=np.uint8).reshape(shape)


def load_idx(
    root: Pathlike,
    *,
    validation_fraction: float = 0.1,
    seed: int = 0,
    mean: float = 0.1307,
    std: float = 0.3081,
    num_classes: int = 10,
) -> Splits[PixelDataset]:
    """Images in the layout of MNIST: ``{train,t10k}-images-idx3-ubyte[.gz]`` and ``-labels-idx1-ubyte[.gz]``.

    Args:
        root: the folder of the four files, or the one around its ``mnist`` or ``raw`` folder.
        validation_fraction: share of the training images set aside; 0 gives no validation.
        seed: decides which ones.
        mean: subtracted from pixels in [0, 1]; the default is that of MNIST.
        std: divides the rest.
        num_classes: labels are below it.

    Raises:
        ConfigError: the fraction is out of range.
        DataError: a file is missing or broken (see :func:`read_idx`), or images and labels do not fit each other.
    """
    base = Path(root)
    place = next(
        (base / part for part in (".", "mnist", "raw", "MNIST/raw") if _idx_file(base / part, "train-images", 3)), base
    )
    pixels, labels = _read_pair(place, "train", num_classes)
    train, validation = set_aside(PixelDataset(pixels, labels, num_classes, mean, std), validation_fraction, seed)
    test_pixels, test_labels = _read_pair(place, "t10k", num_classes)
    if test_pixels.shape[1] != pixels.shape[1]:
        reject(place, f"test images must have {pixels.shape[1]} pixels as the training images", test_pixels.shape[1])
    test = PixelDataset(test_pixels, test_labels, num_classes, mean, std)
    classes = tuple(str(number) for number in range(num_classes))
    return Splits(train=train, validation=validation, test=test, max_length=pixels.shape[1], classes=classes)


def _idx_file(folder: Path, stem: str, dimensions: int) -> Path | None:
    names = [f"{stem}{mark}idx{dimensions}-ubyte{end}" for mark in "-." for end in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_pair(folder: Path, part: str, num_classes: int) -> tuple[Bytes, NDArray[np.int64]]:
    files = []
    for content, dimensions in (("images", 3), ("labels", 1)):
        path = _idx_file(folder, f"{part}-{content}", dimensions)
        if path is None:
            reject(folder, f"must contain {part}-{content}-idx{dimensions}-ubyte or the same with .gz", "no such file")
        files.append(path)
    images, labels = read_idx(files[0], 3), read_idx(files[1], 1).astype(np.int64)
    if len(images) != len(labels):
        reject(files[1], f"must have a label for each of the {len(images)} images", f"{len(labels)} labels")
    _check_labels(files[1], labels, num_classes)
    return images.reshape(len(images), -1), labels
