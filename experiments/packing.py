"""Results and checkpoints as a few tar files of limited size, to be carried from one machine to another."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

LIMIT = 16 * 2**20
"""The most bytes of a file."""
FILES = 8
"""The most files that are made, the one with the results included."""
_BLOCK = 10240
"""Tar files are padded to a multiple of this."""
KEPT = ("config.yaml", "metrics.csv", "checkpoints/last.safetensors")
"""The files that a training run needs to continue."""


def pack_results(folder: Path, out: Path) -> None:
    """Write ``results.tar``: the records and the output of the runs."""
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "results.tar", folder, [*folder.glob("results/*.json"), *folder.glob("logs/*.txt")])


def pack_checkpoints(folder: Path, runs: Sequence[Path], out: Path, limit: int = LIMIT) -> list[Path]:
    """Write ``checkpoints.tar``, ``checkpoints-2.tar`` and so on: what these unfinished runs go on from.

    Args:
        folder: the working folder.
        runs: folders of training runs in it.
        out: where to write.
        limit: bytes that a file may have.

    Returns:
        The runs that do not fit: too large for a file, or too many.
    """
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("checkpoints*.tar"):
        old.unlink()
    files = {run: [run / name for name in KEPT if (run / name).is_file()] for run in runs}
    sizes = {run: _tar_size(each) for run, each in files.items() if run / KEPT[-1] in each}
    left_out = [run for run, size in sizes.items() if size + _BLOCK > limit]
    tars: list[list[Path]] = []
    for run in sorted(sizes.keys() - set(left_out), key=lambda run: sizes[run], reverse=True):
        place = next((tar for tar in tars if sum(sizes[each] for each in [*tar, run]) + _BLOCK <= limit), None)
        if place is None and len(tars) == FILES - 1:
            left_out.append(run)
        elif place is None:
            tars.append([run])
        else:
            place.append(run)
    for number, tar in enumerate(tars, start=1):
        name = "checkpoints.tar" if number == 1 else f"checkpoints-{number}.tar"
        _write(out / name, folder, [file for run in tar for file in files[run]])
    return left_out


def _tar_size(files: Iterable[Path]) -> int:
    return sum(3 * 512 + -(-file.stat().st_size // 512) * 512 for file in files)


def _write(path: Path, folder: Path, files: Iterable[Path]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with tarfile.open(temporary, "w") as tar:
        for file in sorted(files):
            tar.add(file, arcname=str(file.relative_to(folder)), recursive=False)
    temporary.replace(path)


def unpack(source: Path, folder: Path) -> int:
    """Put what the tar files in ``source`` hold into the working folder; existing files stay.

    Returns:
        The number of files.
    """
    count = 0
    for path in sorted(source.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = [member for member in tar if member.isfile() and not (folder / member.name).exists()]
            tar.extractall(folder, members, filter="data")
            count += len(members)
    return count
