"""The first 100 million bytes of the English Wikipedia (Mahoney), for a language model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sma_models.training.data.base import locate
from sma_models.training.data.language import ByteData
from sma_models.training.data.reading import Pathlike, find_folder, read_bytes, reject
from sma_models.training.data.release import Release, Resource
from sma_models.training.data.streams import ByteStream, StreamSplits, checked_splits

RELEASE = Release(
    name="enwik8",
    folder="enwik8",
    resources=(
        Resource(
            url="https://mattmahoney.net/dc/enwik8.zip",
            known_hash="sha256:547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
            unpack="zip",
        ),
    ),
    licence="text of Wikipedia of 2006, under the GNU Free Documentation License",
)
SIZES = (90_000_000, 5_000_000, 5_000_000)
"""Bytes of train, validation and test, as published."""


def load(root: Pathlike) -> StreamSplits:
    """The first 100,000,000 bytes of the English Wikipedia, split 90 M / 5 M / 5 M as published.

    Args:
        root: the file, its folder or the folder around that.

    Raises:
        DataError: the file is missing or has another size.
    """
    path = Path(root)
    if not path.is_file():
        path = find_folder(root, (".", "enwik8"), "enwik8") / "enwik8"
        path = path / "enwik8" if path.is_dir() else path
    content = read_bytes(path)
    if len(content) != sum(SIZES):
        reject(path, f"must have {sum(SIZES)} bytes", len(content))
    stream = ByteStream.join([("enwik8", content)])
    first, second = SIZES[0], SIZES[0] + SIZES[1]
    return checked_splits(stream.cut(0, first), stream.cut(first, second), stream.cut(second, len(stream)))


class Enwik8Data(ByteData):
    """The first 100 million bytes of the English Wikipedia, 90 / 5 / 5 million as published."""

    release = RELEASE

    @dataclass(kw_only=True, frozen=True)
    class Config(ByteData.Config):
        """``root`` is the file, its folder or the one around that; None downloads it."""

        root: str | None = None

    config: Config

    def prepare(self) -> Path:
        return locate(self.release, self.config.root)

    def streams(self) -> StreamSplits:
        return load(self.prepare())
