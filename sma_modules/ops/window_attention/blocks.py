"""Shapes of the tiles that the kernels work on, and how many warps do it: all that can be tuned, in one place."""

from __future__ import annotations

from typing import NamedTuple

import torch

TABLE_COPIES = 16
"""Copies of the table of original positions that programs add to in turn, so that fewer of them collide."""

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
    """Queries and keys of a tile, value features at a time (``features + rest``), warps, and stages of the pipeline of
    loads.
    """

    queries: int
    keys: int
    features: int
    warps: int
    stages: int
    rest: int = 0

    @property
    def diagonals(self) -> int:
        """A power of two that holds the diagonals of a tile of scores."""
        return padded(self.queries + self.keys)

    @property
    def once(self) -> bool:
        """Whether no two threads hold the same score: every warp has 16 queries of its own.

        The compiler may have eight warps work on 64 rows twice.
        """
        return self.queries >= 16 * self.warps and self.keys >= 16

    def tiles(self, width: int) -> int:
        """How many tiles hold ``width`` features."""
        return -(-width // (self.features + self.rest))


class KeyGradientPass(NamedTuple):
    """One launch of the kernel of a block of keys: its tile, and whether it gives the gradient of keys, of values, or
    both (with one tile of features only).
    """

    tile: Blocks
    keys: bool
    values: bool


def padded(width: int) -> int:
    """The power of two, at least 16, that tensor cores work on."""
    return max(16, 1 << (width - 1).bit_length())


def feature_tile(width: int, beside: int, largest: int) -> tuple[int, int]:
    """The tile of value features with the least arithmetic, if every tile needs ``beside`` features more: one power of
    two, or two and their sum, of at most ``largest``. 160 features are 128 and 32, not 256.
    """
    sizes = [size for size in (256, 128, 64, 32, 16) if size <= largest]
    pairs = [(size, 0) for size in sizes]
    pairs += [(size, rest) for size in sizes for rest in sizes if rest < size and size + rest <= largest]
    return min(pairs, key=lambda pair: -(-width // sum(pair)) * (sum(pair) + beside))


def forward_blocks(z: int, width: int, dtype: torch.dtype, reach: int | None, biased: bool) -> Blocks:
    """For a block of queries. Scores are computed again for every tile of features; biases need many registers."""
    beside = padded(z)
    if dtype == torch.float32:
        features, rest = feature_tile(width, beside, 64)
        return Blocks(16 if beside > 128 else 32, 16, features, 8, 1, rest)
    features, rest = feature_tile(width, beside, 256)
    if beside > 128:
        return Blocks(64, 32, min(features, 128), 8, 2)
    if biased:  # a warpgroup holds whole rows of scores, which then need no shared memory
        return Blocks(64, 32, features, 4, 2, rest) if features + rest <= 160 else Blocks(64, 64, features, 8, 2, rest)
    far = reach is None or reach >= 512
    return Blocks(128 if far and features + rest <= 128 else 64, 64, features, 8, 2, rest)


def d_keys_passes(z: int, width: int, dtype: torch.dtype, biased: bool) -> tuple[KeyGradientPass, ...]:
    """For a block of keys."""
    beside, whole = padded(z), padded(width)
    if dtype == torch.float32:
        if beside > 128:
            return in_passes(Blocks(16, 16, min(whole, 32), 8, 1), width)
        largest, stages = (32, 2) if biased else (64, 1)
        return in_passes(Blocks(16, 32, min(whole, largest), 8, stages), width)
    features, rest = feature_tile(width, beside, 256)
    few = biased and dtype != torch.float16  # whose gradients of scores take the registers of float32
    if few and beside <= 64 and whole <= 128:
        return in_passes(Blocks(64, 64, whole, 4, 2), width)
    if few and beside <= 64 and features == 256:
        return in_passes(Blocks(64, 64, 256, 8, 2), width)
    if few and beside <= 128 and features + rest <= 160:
        tile = Blocks(64, 64, features, 4, 2, rest)
        if beside <= 64 and tile.tiles(width) == 1:  # a few bytes are spilled, and two passes take 1.3 times as long
            return (KeyGradientPass(tile, True, True),)
        return KeyGradientPass(tile, False, True), KeyGradientPass(tile._replace(keys=32), True, False)
    if whole <= 128 and beside <= 128:
        return in_passes(Blocks(32 if biased or whole + beside > 128 else 64, 64, whole, 8, 2), width)
    narrow = biased and beside > 128
    return in_passes(
        Blocks(32 if biased or beside > 128 else 64, 64, min(whole, 64 if narrow else 128), 8, 2), width, together=False
    )


def in_passes(tile: Blocks, width: int, together: bool = True) -> tuple[KeyGradientPass, ...]:
    """One pass if one tile holds all features, else one each: that of the keys has to loop over the tiles."""
    if together and tile.tiles(width) == 1:
        return (KeyGradientPass(tile, True, True),)
    return KeyGradientPass(tile, False, True), KeyGradientPass(tile, True, False)


def d_queries_blocks(z: int, width: int, dtype: torch.dtype, biased: bool) -> Blocks:
    """For a block of queries."""
    beside, features = padded(z), padded(width)
    if dtype == torch.float32:
        return Blocks(16, 16, min(features, 32), 4 if beside == 128 and not biased else 8, 1)
    if biased and beside <= 128 and width <= 320 and dtype != torch.float16:
        features, rest = feature_tile(width, beside, 320)
        return Blocks(64, 32, features, 4, 2, rest)
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
