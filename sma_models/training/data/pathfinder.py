"""Are two dots joined by a dashed line? Pathfinder (32 x 32) and Path-X (128 x 128) of Long Range Arena.

``root/pathfinder<resolution>/<difficulty>/metadata/*.npy`` are, their name aside, lines of text
``<folder> <image> <number> <label> ...``; the images are PNG files. Reading them needs Pillow.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sma.errors import ConfigError, MissingExtraError
from sma_models.training.data import long_range_arena
from sma_models.training.data.base import ReleasedData, Task, classification
from sma_models.training.data.batches import Item
from sma_models.training.data.labelled import Splits, ValueDataset, normalise
from sma_models.training.data.randomness import SPLIT, Draws
from sma_models.training.data.reading import Pathlike, find_folder, list_files, read_lines, reject

DIFFICULTIES = ("curv_baseline", "curv_contour_length_9", "curv_contour_length_14")
"""Easy, intermediate, hard; the published task is the hard one."""
CLASSES = ("apart", "joined")
EMPTY_IN_RELEASE = frozenset({("pathfinder32", "curv_baseline", "imgs/0/sample_172.png")})
"""Listed images that the official release has as empty files; they are left out."""


def read_png(path: Pathlike, resolution: int) -> NDArray[np.uint8]:
    """A grey image (resolution, resolution) uint8.

    Raises:
        MissingExtraError: Pillow is not installed.
        DataError: the file is missing, no whole image, or of another size.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingExtraError(f"{path}: reading PNG images needs Pillow (pip install pillow), got: {error}") from None
    try:
        with Image.open(path) as image:
            if image.size != (resolution, resolution):
                reject(path, f"must be {resolution} x {resolution} pixels", "{} x {}".format(*image.size))
            return np.asarray(image.convert("L"), dtype=np.uint8)
    except UnidentifiedImageError:
        reject(path, "must be a PNG image", "something else")
    except (OSError, SyntaxError, ValueError) as error:  # Pillow reports broken files by any of these
        reject(path, "must be a whole PNG image", str(error))


class PathImages(ValueDataset):
    """Images read one by one on access: ``values (resolution^2,)`` float32, (pixel / 255 - mean) / std.

    Args:
        root: the folder that the files are relative to.
        files: (N,) the images.
        labels: (N,) their classes.
        resolution: width and height.
        mean: subtracted from pixels in [0, 1].
        std: divides the rest.
    """

    def __init__(
        self, root: Path, files: Sequence[str], labels: Sequence[int], resolution: int, mean: float, std: float
    ) -> None:
        super().__init__(labels, len(CLASSES))
        self.root = root
        self.files = np.array(files)
        self.resolution = resolution
        self.mean = mean
        self.std = std

    def sample(self, stored: int) -> Item:
        pixels = read_png(self.root / str(self.files[stored]), self.resolution)
        return {"values": normalise(pixels, self.mean, self.std)}


def read_metadata(folder: Path) -> list[tuple[str, int]]:
    """The (image, label) pairs that ``folder/metadata/*.npy`` list, in the order of their numbers.

    Raises:
        DataError: no list, an empty one, one that is no text, a line with fewer than four columns, a label other than
            0 and 1, an image that does not exist or is listed twice.
    """
    lists = sorted(list_files(folder / "metadata", ".npy"), key=_by_number)
    there: dict[str, set[str]] = {}
    found: dict[str, int] = {}
    for name in lists:
        path = folder / "metadata" / name
        for number, line in read_lines(path):
            if number == 1 and line.startswith(b"\x93NUMPY"):
                reject(path, "must be lines of text, as in the official release", "a binary NumPy array")
            columns = line.decode("utf-8", "replace").split()
            if len(columns) < 4 or columns[3] not in ("0", "1"):
                reject(
                    path,
                    f"line {number}: must be <folder> <image> <number> <label 0 or 1> ...",
                    line[:60].decode("utf-8", "replace"),
                )
            place, image = columns[0], columns[1]
            if place not in there:
                there[place] = set(list_files(folder / place, ".png"))
            file = f"{place}/{image}"
            if image not in there[place] or file in found:
                reject(path, f"line {number}: must name an image that exists, once", file)
            if (folder.parent.name, folder.name, file) not in EMPTY_IN_RELEASE:
                found[file] = int(columns[3])
    return list(found.items())


def _by_number(name: str) -> tuple[int, str]:
    digits = re.search(r"\d+", name)
    return (int(digits.group()) if digits else -1, name)


def load(
    root: Pathlike,
    *,
    resolution: int = 32,
    difficulty: str = "curv_contour_length_14",
    fractions: tuple[float, float] = (0.1, 0.1),
    seed: int = 0,
    mean: float = 0.5,
    std: float = 0.5,
) -> Splits[PathImages]:
    """The whole task from ``root``, the folder of ``pathfinder32`` and so on or one around it.

    The release has no split of its own; published results hold out 10 % and 10 % at random.

    Args:
        root: where the data lie.
        resolution: 32 (Pathfinder), 64, 128 (Path-X) or 256.
        difficulty: one of :data:`DIFFICULTIES`.
        fractions: shares of validation and test.
        seed: decides which images.
        mean: subtracted from pixels in [0, 1].
        std: divides the rest.

    Raises:
        ConfigError: an argument is out of range, or a part would be empty.
        MissingExtraError: Pillow is not installed.
        DataError: see :func:`read_metadata` and :func:`read_png`.
    """
    if difficulty not in DIFFICULTIES:
        raise ConfigError(f"difficulty: must be one of {DIFFICULTIES}, got {difficulty!r}")
    if min(fractions) <= 0.0 or sum(fractions) >= 1.0:
        raise ConfigError(f"fractions: must be two shares above 0 with a sum below 1, got {fractions!r}")
    name = f"pathfinder{resolution}/{difficulty}"
    folder = find_folder(root, (".", "lra_release", "lra_release/lra_release"), name) / name
    entries = read_metadata(folder)
    read_png(folder / entries[0][0], resolution)  # a missing Pillow or a wrong resolution shows before any work
    files, labels = [file for file, _ in entries], [label for _, label in entries]
    whole = PathImages(folder, files, labels, resolution, mean, std)
    validation, test = (round(fraction * len(whole)) for fraction in fractions)
    if min(validation, test, len(whole) - validation - test) < 1:
        raise ConfigError(f"fractions: must leave images in each part of {len(whole)} images, got {fractions!r}")
    order = Draws(seed, SPLIT).permutation(len(whole))
    return Splits(
        train=whole.subset(np.sort(order[validation + test :])),
        validation=whole.subset(np.sort(order[:validation])),
        test=whole.subset(np.sort(order[validation : validation + test])),
        max_length=resolution**2,
        classes=CLASSES,
    )


class PathfinderData(ReleasedData):
    """Are two dots joined? ``resolution`` 32 is Pathfinder, 128 is Path-X."""

    release = long_range_arena.RELEASE

    @dataclass(kw_only=True, frozen=True)
    class Config(ReleasedData.Config):
        resolution: int = 32
        difficulty: str = "curv_contour_length_14"
        fractions: tuple[float, float] = (0.1, 0.1)
        seed: int = 0
        mean: float = 0.5
        std: float = 0.5

        def __post_init__(self) -> None:
            self.require(self.std > 0, "std", "must be positive")

    config: Config

    def open(self, *, seed: int) -> Task:
        c = self.config
        return classification(
            load(
                self.prepare(),
                resolution=c.resolution,
                difficulty=c.difficulty,
                fractions=c.fractions,
                seed=c.seed,
                mean=c.mean,
                std=c.std,
            )
        )
