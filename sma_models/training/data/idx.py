"""Grey images in idx files, the layout of MNIST (LeCun, Cortes and Burges), pixel by pixel."""

from __future__ import annotations

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from sma_models.training.data.base import ReleasedData, Task, classification
from sma_models.training.data.labelled import Bytes, PixelDataset, Splits, set_aside
from sma_models.training.data.reading import Pathlike, check_labels, read_bytes, reject
from sma_models.training.data.release import Release, Resource

_PLACE = "https://ossci-datasets.s3.amazonaws.com/mnist"
_HASHES = {
    "train-images-idx3-ubyte.gz": "md5:f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "md5:d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "md5:9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "md5:ec29112dd5afa0611ce80d1b7f02629c",
}
RELEASE = Release(
    name="mnist",
    folder="mnist",
    resources=tuple(Resource(url=f"{_PLACE}/{name}", known_hash=known, unpack="no") for name, known in _HASHES.items()),
    licence="CC BY-SA 3.0",
)


def read(path: Pathlike, dimensions: int) -> Bytes:
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
            return _read_open(path, file, dimensions)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        reject(path, "must be a whole gzip file", str(error))


def _read_open(path: Pathlike, file: IO[bytes] | gzip.GzipFile, dimensions: int) -> Bytes:
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
    # Read in chunks: a header that lies must not reserve the memory it claims.
    chunks, missing = [], size
    while missing and (chunk := file.read(min(missing, 1 << 24))):
        chunks.append(chunk)
        missing -= len(chunk)
    if missing or file.read(1):
        held = f"{size - missing} bytes" if missing else "more"
        reject(path, f"must hold the {size} bytes of shape {shape} that its header states", held)
    return np.frombuffer(b"".join(chunks), dtype=np.uint8).reshape(shape)


def load(
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
        DataError: a file is missing or broken (see :func:`read`), or images and labels do not fit each other.
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
    images, labels = read(files[0], 3), read(files[1], 1).astype(np.int64)
    if len(images) != len(labels):
        reject(files[1], f"must have a label for each of the {len(images)} images", f"{len(labels)} labels")
    check_labels(files[1], labels, num_classes)
    return images.reshape(len(images), -1), labels


class IdxData(ReleasedData):
    """Images in the idx files of MNIST, pixel by pixel."""

    release = RELEASE

    @dataclass(kw_only=True, frozen=True)
    class Config(ReleasedData.Config):
        validation_fraction: float = 0.1
        seed: int = 0
        mean: float = 0.1307
        std: float = 0.3081
        num_classes: int = 10

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
                num_classes=c.num_classes,
            )
        )
