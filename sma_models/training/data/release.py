"""Published data sets: what a release consists of, and where downloads are kept on this machine."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Resource:
    """One file of a release.

    Attributes:
        url: where it is, by http or https.
        known_hash: "md5:..." or "sha256:..." of the file, or None for trust on first use.
        unpack: "tar" (with any compression), "zip", or "no".
        top: the folder inside the archive whose content is wanted; "" means everything in it.
    """

    url: str
    known_hash: str | None
    unpack: Literal["tar", "zip", "no"]
    top: str = ""

    @property
    def file_name(self) -> str:
        """The name under which it is kept."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class Release:
    """The files of a published data set.

    Attributes:
        name: of the data set, in messages.
        folder: in the cache, that the files end up in.
        resources: the files.
        licence: what its makers say about its use.
    """

    name: str
    folder: str
    resources: tuple[Resource, ...]
    licence: str


def cache_folder() -> Path:
    """Where downloads are kept: ``$SMA_CACHE``, else a folder in the user's cache."""
    chosen = os.environ.get("SMA_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sma"
