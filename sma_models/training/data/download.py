"""Downloads of releases: checked, complete or not at all, continued after an interruption.

:func:`fetch` gets a :class:`~sma_models.training.data.release.Release`; call it from one process. A file is kept only
when its checksum is right. Two kinds of checksum:

* published by the makers of the data or by the big data libraries: written beside the reader of the data set. An attack
  on the server is noticed;
* none published (the release of Long Range Arena): the SHA-256 of the first download is written next to the file as
  ``<file>.sha256`` and every later download has to agree with it. That is trust on first use, and logged as such.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import os
import shutil
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pooch  # type: ignore[import-untyped]

from sma_models.training.data.reading import Pathlike, reject
from sma_models.training.data.release import Release, Resource

log = logging.getLogger(__name__)


def fetch(release: Release, cache: Pathlike) -> Path:
    """Download and unpack ``release`` into a folder of ``cache``, unless that folder exists.

    The folder appears under its name only when it is complete. Downloaded archives stay in ``cache/downloads``.

    Raises:
        DataError: no connection, an answer other than 200, a transfer that was cut off (the next call goes on from
            there), a wrong checksum, a broken archive, or one that would write outside its folder.
    """
    target = Path(cache) / release.folder
    if target.is_dir():
        return target
    log.info("downloading the %s data; licence: %s", release.name, release.licence)
    downloads = Path(cache) / "downloads"
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        files = [download(resource, downloads) for resource in release.resources]
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=cache) as scratch:
            fresh = Path(scratch) / "content"
            fresh.mkdir()
            for resource, file in zip(release.resources, files, strict=True):
                _unpack(resource, file, fresh)
            _move_into_place(fresh, target)
    except OSError as error:
        reject(cache, "must be a folder that can be written, with enough free space", error.strerror or str(error))
    return target


def _move_into_place(fresh: Path, target: Path) -> None:
    try:
        fresh.rename(target)
    except OSError:
        if not target.is_dir():  # otherwise another process was faster, with the same content
            raise


def download(resource: Resource, folder: Path) -> Path:
    """Download one file into ``folder``, or check an existing one.

    Raises:
        DataError: see :func:`fetch`.
    """
    record = folder / f"{resource.file_name}.sha256"
    known_hash = resource.known_hash
    if known_hash is None and record.exists():
        known_hash = f"sha256:{record.read_text().split()[0]}"
    try:
        path = pooch.retrieve(
            resource.url, known_hash=known_hash, fname=resource.file_name, path=folder, downloader=_ResumingDownloader()
        )
    except ValueError as error:  # how pooch reports a wrong checksum
        reject(resource.url, f"must have the checksum {known_hash}", str(error))
    if known_hash is None:
        digest = pooch.file_hash(path, alg="sha256")
        record.write_text(f"{digest}  {resource.file_name}\n")
        log.warning("%s: no checksum is published; trusting this first download, sha256 %s", resource.url, digest)
    return Path(path)


class _ResumingDownloader:
    """A downloader for pooch that keeps what has arrived and goes on from there.

    The bytes are collected in ``<hash of the address>.part``, together with the validator (ETag or date) of the
    server's version, so that parts of two versions are never joined. Pooch checks the sum and moves the file.
    """

    def __call__(self, url: str, output_file: Any, _: Any) -> None:
        if not url.startswith(("http://", "https://")):
            reject(url, "must be an address of http or https", url.partition(":")[0])
        part = Path(output_file).parent / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.part"
        try:
            self._resume(url, part)
        except urllib.error.HTTPError as error:
            with contextlib.closing(error):
                reject(url, "the server must answer 200", f"{error.code} {error.reason}")
        except urllib.error.URLError as error:
            reject(url, "must be reachable", str(error.reason))
        except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
            reject(url, "the transfer must not be cut off (call again to go on)", f"{type(error).__name__} {error}")
        os.replace(part, output_file)
        _validator_file(part).unlink(missing_ok=True)

    def _resume(self, url: str, part: Path) -> None:
        try:
            self._continue(url, part)
        except urllib.error.HTTPError as error:
            if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE or not part.exists():
                raise
            error.close()  # the part was whole already, or longer than the file is now: start again
            part.unlink()
            self._continue(url, part)

    def _continue(self, url: str, part: Path) -> None:
        """Append to ``part`` until it is whole."""
        done = part.stat().st_size if part.exists() and _validator_file(part).exists() else 0
        request = urllib.request.Request(url, headers={"Accept-Encoding": "identity"})
        if done:
            request.add_header("Range", f"bytes={done}-")
            request.add_header("If-Range", _validator_file(part).read_text())
        with urllib.request.urlopen(request, timeout=60) as answer:
            if answer.status != http.client.PARTIAL_CONTENT:
                done = 0
            elif not answer.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
                part.unlink()
                reject(url, f"the server must go on at byte {done}", repr(answer.headers.get("Content-Range")))
            stated = answer.headers.get("Content-Length")
            self._note_validator(answer.headers, part)
            with open(part, "ab" if done else "wb") as file:
                shutil.copyfileobj(answer, file, 1 << 20)
                arrived = file.tell() - done
        if stated is not None and arrived != int(stated):
            rule = f"the transfer must bring the {stated} bytes announced (call again to go on)"
            reject(url, rule, f"{arrived} bytes")

    def _note_validator(self, headers: Any, part: Path) -> None:
        tag = headers.get("ETag") or ""
        validator = tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")
        if validator:
            _validator_file(part).write_text(validator)
        else:
            _validator_file(part).unlink(missing_ok=True)


def _validator_file(part: Path) -> Path:
    return part.with_suffix(".version")


def _unpack(resource: Resource, file: Path, target: Path) -> None:
    """Put the content of one downloaded file into the folder ``target``."""
    if resource.unpack == "no":
        shutil.copyfile(file, target / resource.file_name)
        return
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=target.parent) as scratch:
        extract = {"tar": extract_tar, "zip": extract_zip}[resource.unpack]
        extract(file, Path(scratch))
        source = Path(scratch) / resource.top
        if not source.is_dir():
            reject(file, f"the archive must contain the folder {resource.top!r}", sorted(os.listdir(scratch))[:5])
        for entry in sorted(source.iterdir()):
            entry.rename(target / entry.name)


def extract_tar(file: Path, target: Path) -> None:
    """Unpack a tar archive with Python's ``data`` filter: no paths or links outside, no devices, no owners.

    Raises:
        DataError: broken, or unsafe.
    """
    if not hasattr(tarfile, "data_filter"):
        reject(file, "unpacking safely needs Python 3.11.4 or later", sys.version.split()[0])
    try:
        with tarfile.open(file) as archive:
            archive.extractall(target, filter="data")
            # Unpacking stops at the last member; only reading on shows that the compressed file is whole.
            while archive.fileobj is not None and archive.fileobj.read(1 << 20):
                pass
    except tarfile.FilterError as error:
        reject(file, "an archive must not reach outside its folder", str(error))
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reject(file, "must be a whole tar archive", str(error))


def extract_zip(file: Path, target: Path) -> None:
    """Unpack a zip archive whose names are all below its own folder.

    Raises:
        DataError: broken, encrypted, or unsafe.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            for name in _unsafe_names(archive):
                reject(file, "an archive must not reach outside its folder", name)
            archive.extractall(target)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        reject(file, "must be a whole, unencrypted zip archive", str(error))


def _unsafe_names(archive: zipfile.ZipFile) -> Iterator[str]:
    for name in archive.namelist():
        parts = name.replace("\\", "/").split("/")
        if ".." in parts or parts[0] == "" or ":" in parts[0]:
            yield name
