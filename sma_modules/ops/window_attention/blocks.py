"""Shapes of the tiles that the kernels work on, and how many warps do it: all that can be tuned, in one place."""

from __future__ import annotations

from typing import NamedTuple

TABLE_COPIES = 8
"""Copies of the table of original positions that programs add to in turn, so that fewer wait for each other."""

FLOAT32_PRECISION = "ieee"
"""How float32 is multiplied: "ieee", or "tf32x3" on tensor cores, faster, with up to 2.4 times the error."""

FEWEST_QUERIES = 0
"""With fewer queries the eager backend is taken: a matter of measurement, 0 until one says otherwise."""

MAXIMUM_QK = 256
"""Widest queries and keys: a tile of them is held whole."""


WARPS = 8 * 132
"""How many run at once on an H100: the registers of a multiprocessor hold 8 warps of kernels that take nearly all there
are, 255 a thread."""

MOST_SPLITS = 8
"""More would spend on adding up what they gain."""


class Blocks(NamedTuple):
    """Queries and keys of a tile, value features at a time, warps, and stages of the pipeline of loads."""

    queries: int
    keys: int
    features: int
    warps: int
    stages: int

    @property
    def diagonals(self) -> int:
        """A power of two that holds the diagonals of a tile of scores."""
        return padded(self.queries + self.keys)


def padded(width: int) -> int:
    """The power of two, at least 16, that tensor cores work on."""
    return max(16, 1 << (width - 1).bit_length())


def feature_tile(width: int, beside: int, largest: int) -> int:
    """The tile of value features with the least arithmetic, if every tile needs ``beside`` features more."""
    sizes = [size for size in (16, 32, 64, 128, 256) if size <= largest]
    return min(reversed(sizes), key=lambda size: -(-width // size) * (size + beside))


def forward_blocks(z: int, width: int, itemsize: int, reach: int | None, biased: bool) -> Blocks:
    """For a block of queries. Scores are computed again for every tile of features; biases need many registers."""
    beside = padded(z)
    if itemsize == 4:
        return Blocks(16 if beside > 128 else 32, 16, feature_tile(width, beside, 64), 8, 1)
    features = feature_tile(width, beside, 128 if biased else 256)
    if beside > 128:
        return Blocks(64, 32, min(features, 128), 8, 2)
    if biased:
        return Blocks(64, 32, features, 8, 2)
    far = reach is None or reach >= 512
    return Blocks(128 if far and features <= 128 else 64, 64, features, 8, 2)


def d_keys_blocks(z: int, width: int, itemsize: int, biased: bool) -> tuple[Blocks, bool]:
    """For a block of keys; and whether one pass gives the gradients of keys and of values (one tile of features)."""
    beside, features = padded(z), padded(width)
    if itemsize == 4:
        if beside > 128:
            return Blocks(16, 16, min(features, 32), 8, 1), features <= 32
        largest, stages = (32, 2) if biased else (64, 1)
        return Blocks(16, 32, min(features, largest), 8, stages), features <= largest
    if features <= 128 and beside <= 128:
        return Blocks(32 if biased or features + beside > 128 else 64, 64, features, 8, 2), True
    narrow = biased and beside > 128
    return Blocks(32 if biased or beside > 128 else 64, 64, min(features, 64 if narrow else 128), 8, 2), False


def d_queries_blocks(z: int, width: int, itemsize: int, biased: bool) -> Blocks:
    """For a block of queries."""
    beside, features = padded(z), padded(width)
    if itemsize == 4:
        return Blocks(16, 16, min(features, 32), 4 if beside == 128 and not biased else 8, 1)
    if features <= 256 and beside <= 128:
        return Blocks(64, 32 if biased else 64, features, 8, 2)
    if not biased and beside <= 128:  # few warps: two programs fit a multiprocessor
        return Blocks(64, 64, 64, 4, 4)
    if biased and beside > 128:
        return Blocks(32, 32, 64, 8, 2)
    return Blocks(64, 32, 64, 8, 2)


def splits(programs: int, warps: int, tiles: int) -> int:
    """Among how many programs each one of ``programs``, which are too few to keep a GPU busy, shares out its loop over
    ``tiles`` tiles: as many as run at once, with two tiles each at least.
    """
    return max(min(WARPS // (max(programs, 1) * warps), MOST_SPLITS, tiles // 2), 1)
