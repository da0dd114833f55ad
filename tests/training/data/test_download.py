"""Downloads, against a server on this machine: right and wrong sums, cut transfers, hostile archives."""

from __future__ import annotations

import hashlib
import http.server
import io
import logging
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from sma.errors import DataError, MissingExtraError
from sma.plugins import registry
from sma_models.training.data import download
from sma_models.training.data.base import locate
from sma_models.training.data.release import Release, Resource, cache_folder

CONTENT = bytes(range(256)) * 4096  # 1 MiB


@dataclass
class Server:
    """What the server holds, how it misbehaves, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    cut_after: int | None = None
    version: str | None = '"1"'
    ranges: bool = True
    wrong_range: bool = False
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    address: str = ""

    def url(self, name: str) -> str:
        return f"{self.address}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    state: Server

    def do_GET(self) -> None:
        state, wanted = self.state, self.headers.get("Range")
        state.asked.append((self.path, wanted))
        content = state.files.get(self.path.lstrip("/"))
        if content is None:
            self.send_error(404)
            return
        start = 0
        if wanted and state.ranges and self.headers.get("If-Range") == state.version:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        if start:
            first = 0 if state.wrong_range else start
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        if state.version:
            self.send_header("ETag", state.version)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : None if state.cut_after is None else start + state.cut_after])

    def log_message(self, format: str, *args: object) -> None:
        """Keep the tests quiet."""


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()
    handler = type("BoundHandler", (Handler,), {"state": state})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        state.address = f"http://127.0.0.1:{listening.server_port}"
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        listening.shutdown()
        thread.join()


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def tar_of(files: dict[str, bytes], link: tuple[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        if link:
            member = tarfile.TarInfo(link[0])
            member.type, member.linkname = tarfile.SYMTYPE, link[1]
            archive.addfile(member)
    return buffer.getvalue()


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def plain(server: Server, content: bytes = CONTENT, known_hash: str | None = "") -> Resource:
    server.files["data.bin"] = content
    known = sha256(content) if known_hash == "" else known_hash
    return Resource(url=server.url("data.bin"), known_hash=known, unpack="no")


def test_a_good_file_is_downloaded_once(server: Server, tmp_path: Path) -> None:
    resource = plain(server)
    path = download.download(resource, tmp_path)
    assert path.read_bytes() == CONTENT
    assert download.download(resource, tmp_path) == path
    assert server.asked == [("/data.bin", None)]
    assert [entry.name for entry in tmp_path.iterdir()] == ["data.bin"]


def test_a_wrong_sum_leaves_nothing(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.bin: must have the checksum sha256:0000"):
        download.download(plain(server, known_hash="sha256:" + "0" * 64), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_downloaded_again(server: Server, tmp_path: Path) -> None:
    resource = plain(server)
    (tmp_path / "data.bin").write_bytes(b"damaged")
    assert download.download(resource, tmp_path).read_bytes() == CONTENT


def test_a_cut_transfer_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    resource = plain(server)
    server.cut_after = 300_000
    for _ in range(2):
        with pytest.raises(DataError, match=r"data\.bin: the transfer must"):
            download.download(resource, tmp_path)
        assert not (tmp_path / "data.bin").exists()
    server.cut_after = None
    assert download.download(resource, tmp_path).read_bytes() == CONTENT
    assert [wanted for _, wanted in server.asked] == [None, "bytes=300000-", "bytes=600000-"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["data.bin"]


@pytest.mark.parametrize("reason", ["new version", "no ranges", "no version"])
def test_parts_of_two_versions_are_never_joined(server: Server, tmp_path: Path, reason: str) -> None:
    resource = plain(server)
    server.cut_after = 300_000
    server.version = None if reason == "no version" else '"1"'
    with pytest.raises(DataError):
        download.download(resource, tmp_path)
    server.cut_after = None
    server.ranges = reason != "no ranges"
    changed = CONTENT[::-1]
    server.version = '"2"' if reason == "new version" else server.version
    assert download.download(plain(server, changed), tmp_path).read_bytes() == changed


def test_a_server_that_goes_on_elsewhere_is_refused(server: Server, tmp_path: Path) -> None:
    resource = plain(server)
    server.cut_after = 300_000
    with pytest.raises(DataError):
        download.download(resource, tmp_path)
    server.cut_after, server.wrong_range = None, True
    with pytest.raises(DataError, match="must go on at byte 300000"):
        download.download(resource, tmp_path)
    server.wrong_range = False
    assert download.download(resource, tmp_path).read_bytes() == CONTENT


def test_a_part_that_is_already_whole_does_no_harm(server: Server, tmp_path: Path) -> None:
    resource = plain(server)
    server.cut_after = 10
    with pytest.raises(DataError):
        download.download(resource, tmp_path)
    (part,) = tmp_path.glob("*.part")
    part.write_bytes(CONTENT)
    server.cut_after = None
    assert download.download(resource, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("known_hash", ["", None])
def test_a_missing_file_is_one_error(server: Server, tmp_path: Path, known_hash: str | None) -> None:
    resource = plain(server, known_hash=known_hash)
    del server.files["data.bin"]
    with pytest.raises(DataError, match=r"data\.bin: the server must answer 200, got 404"):
        download.download(resource, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_server_is_one_error(tmp_path: Path) -> None:
    resource = Resource(url="http://127.0.0.1:9/data.bin", known_hash=None, unpack="no")
    with pytest.raises(DataError, match="must be reachable"):
        download.download(resource, tmp_path)
    local = Resource(url="file:///etc/hostname", known_hash=None, unpack="no")
    with pytest.raises(DataError, match="must be an address of http or https"):
        download.download(local, tmp_path)


def test_trust_on_first_use_is_recorded_and_kept(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        path = download.download(plain(server, known_hash=None), tmp_path)
    assert "trusting this first download" in caplog.text
    record = tmp_path / "data.bin.sha256"
    assert f"sha256:{record.read_text().split()[0]}" == sha256(CONTENT)
    path.unlink()
    assert download.download(plain(server, known_hash=None), tmp_path).read_bytes() == CONTENT
    path.unlink()
    with pytest.raises(DataError, match="must have the checksum"):
        download.download(plain(server, b"something else", known_hash=None), tmp_path)


def release_of(server: Server, archive: bytes, unpack: str, top: str = "") -> Release:
    server.files["set.archive"] = archive
    resource = Resource(url=server.url("set.archive"), known_hash=sha256(archive), unpack=unpack, top=top)  # type: ignore[arg-type]
    return Release(name="poems", folder="set", resources=(resource,), licence="CC0")


FILES = {"top/a.txt": b"a", "top/below/b.txt": b"b"}


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("top", ["", "top"])
def test_archives_are_unpacked_once(server: Server, tmp_path: Path, kind: str, top: str) -> None:
    release = release_of(server, (tar_of if kind == "tar" else zip_of)(FILES), kind, top)
    folder = download.fetch(release, tmp_path)
    assert folder == tmp_path / "set"
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.txt")}
    assert found == {name.removeprefix(f"{top}/") if top else name: content for name, content in FILES.items()}
    server.files.clear()
    assert download.fetch(release, tmp_path) == folder
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["downloads", "set"]


def test_several_files_form_one_folder(server: Server, tmp_path: Path) -> None:
    server.files |= {"a.gz": b"1", "b.gz": b"2"}
    resources = [Resource(url=server.url(n), known_hash=sha256(c), unpack="no") for n, c in server.files.items()]
    folder = download.fetch(Release(name="poems", folder="set", resources=tuple(resources), licence="CC0"), tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a.gz": b"1", "b.gz": b"2"}


@pytest.mark.parametrize(
    ("archive", "kind", "message"),
    [
        (tar_of({"../escaped.txt": b"x"}), "tar", "must not reach outside its folder"),
        (tar_of({"good.txt": b"x"}, link=("link", "/etc")), "tar", "must not reach outside its folder"),
        (tar_of({"good.txt": b"x"}, link=("link", "../../..")), "tar", "must not reach outside its folder"),
        (zip_of({"../escaped.txt": b"x"}), "zip", "must not reach outside its folder"),
        (zip_of({"/escaped.txt": b"x"}), "zip", "must not reach outside its folder"),
        (zip_of({"a/..\\..\\escaped.txt": b"x"}), "zip", "must not reach outside its folder"),
        (tar_of(FILES)[:-20], "tar", "must be a whole tar archive"),
        (b"<html>", "tar", "must be a whole tar archive"),
        (zip_of(FILES)[:-20], "zip", "must be a whole, unencrypted zip archive"),
        (tar_of({"other/a.txt": b"x"}), "tar", "must contain the folder 'top'"),
    ],
)
def test_bad_archives_leave_nothing_unpacked(
    server: Server, tmp_path: Path, archive: bytes, kind: str, message: str
) -> None:
    cache = tmp_path / "deep/below"
    with pytest.raises(DataError, match=message):
        download.fetch(release_of(server, archive, kind, top="top"), cache)
    assert [entry.name for entry in cache.iterdir()] == ["downloads"]
    assert not list(tmp_path.rglob("escaped*"))


def test_an_absolute_tar_path_stays_inside(server: Server, tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    folder = download.fetch(release_of(server, tar_of({str(outside): b"x"}), "tar"), tmp_path / "cache")
    assert not outside.exists()
    assert [path.name for path in folder.rglob("*.txt")] == ["outside.txt"]


def test_a_root_never_touches_the_network(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SMA_CACHE", str(tmp_path / "cache"))
    release = release_of(server, tar_of(FILES), "tar")
    assert locate(release, str(tmp_path)) == tmp_path
    with pytest.raises(DataError, match="must be the folder of the poems data, got nothing there"):
        locate(release, str(tmp_path / "nowhere"))
    assert server.asked == []
    assert locate(release) == tmp_path / "cache/set"
    assert len(server.asked) == 1


@pytest.mark.parametrize("root", [None, "there"])
def test_only_a_download_needs_the_downloader(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str | None
) -> None:
    monkeypatch.setitem(sys.modules, "sma_models.training.data.download", None)
    (tmp_path / "there").mkdir()
    release = release_of(server, tar_of(FILES), "tar")
    if root:
        assert locate(release, str(tmp_path / root)) == tmp_path / root
    else:
        with pytest.raises(MissingExtraError, match="downloads need pooch, from the extra 'train'"):
            locate(release)


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("SMA_CACHE", raising=False)
    assert cache_folder() == tmp_path / "sma"
    monkeypatch.setenv("SMA_CACHE", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here"


def test_a_cache_that_cannot_be_written_is_one_error(server: Server, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match="must be a folder that can be written"):
        download.fetch(release_of(server, tar_of(FILES), "tar"), tmp_path / "cache")


def releases() -> dict[str, Release]:
    """The releases of all registered data sets, by the folder in the cache."""
    plugins = [entry.target for entry in registry().entries() if entry.kind == "data"]
    found = [plugin.release for plugin in plugins if hasattr(plugin, "release")]
    return {release.folder: release for release in found}


def test_every_release_names_its_sums_or_none() -> None:
    published = {"aclImdb", "cifar-10-batches-bin", "mnist", "speech_commands_v0.02", "enwik8", "lra_release"}
    assert published <= set(releases())
    unknown = [name for name, release in releases().items() for r in release.resources if r.known_hash is None]
    assert unknown == ["lra_release"]
    for release in releases().values():
        assert release.licence
        for resource in release.resources:
            assert resource.url.startswith("https://")
            if resource.known_hash:
                algorithm, _, digest = resource.known_hash.partition(":")
                assert len(bytes.fromhex(digest)) == hashlib.new(algorithm).digest_size
