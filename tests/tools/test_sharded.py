"""``fully_shard`` of any single part: the loss and the gradients of one process, and a decoder that still decodes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch.multiprocessing as mp

from tests.tools import sharding

LIMIT_S = 150.0


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each process found out, by the case. One pair of processes goes through all."""
    folder = tmp_path_factory.mktemp("sharded")
    context = mp.start_processes(sharding.run, (str(folder),), nprocs=sharding.WORLD, join=False, start_method="spawn")  # type: ignore[no-untyped-call]
    until = time.monotonic() + LIMIT_S
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > until:
                pytest.fail(f"hangs after {LIMIT_S:.0f} s: {_last(folder)}", pytrace=False)
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    lines = [
        line for rank in range(sharding.WORLD) for line in (folder / f"{rank}.txt").read_text("utf-8").splitlines()
    ]
    found: dict[str, str] = {}
    for line in lines:
        spec, name, outcome = line.split(": ", 2)
        case = f"{spec}: {name}"
        found[case] = outcome if found.get(case, "works") == "works" else found[case]
    return found


def _last(folder: Path) -> str:
    """The last case that a process has finished."""
    return "; ".join((path.read_text("utf-8").splitlines() or ["nothing"])[-1] for path in sorted(folder.glob("*.txt")))


@pytest.mark.parametrize(("spec", "name"), list(sharding.cases()))
def test_fully_shard(outcomes: dict[str, str], spec: str, name: str) -> None:
    assert outcomes[f"{spec}: {name}"] == "works"
