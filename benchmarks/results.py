"""The results: every round of every row, and the environment that the numbers depend on."""

from __future__ import annotations

import json
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import sma

ROOT = Path(__file__).parent.parent


@dataclass
class Result:
    """The measurements of one row.

    Attributes:
        workload: its name.
        model: the label of the row.
        parameters: how many the model has.
        share: of the tokens that were active, where that is decided.
        overflow: active tokens dropped for lack of capacity.
        train_ms: a training step (or the forward and backward pass) in every round.
        forward_ms: the forward pass in every round.
        train_mib: peak of allocated memory of a training step (or of the forward pass, where there is no other),
            weights and all; None where the device does not report it.
        waits: how often the host synchronises with the device in a training step; None on a CPU.
        backends: which backend each operation took.
        error: why it was not measured.
    """

    workload: str
    model: str
    parameters: int | None = None
    share: float | None = None
    overflow: int = 0
    train_ms: list[float] | None = None
    forward_ms: list[float] | None = None
    train_mib: float | None = None
    waits: int | None = None
    backends: dict[str, str] = field(default_factory=dict)
    error: str | None = None


@dataclass
class Record:
    """A file of results.

    Attributes:
        environment: what the numbers depend on.
        workloads: by name the title, the rows that stand for the library and for the others, and what was trained.
        rows: what was measured of the workloads.
        sweeps: what :mod:`benchmarks.sweeps` measured.
        profiles: what :mod:`benchmarks.profiles` measured.
        streams: what :mod:`benchmarks.streaming` measured.
        exactness: what :mod:`benchmarks.exactness` measured.
    """

    environment: dict[str, Any]
    workloads: dict[str, dict[str, str]] = field(default_factory=dict)
    rows: list[Result] = field(default_factory=list)
    sweeps: list[dict[str, Any]] = field(default_factory=list)
    profiles: list[dict[str, Any]] = field(default_factory=list)
    streams: list[dict[str, Any]] = field(default_factory=list)
    exactness: list[dict[str, Any]] = field(default_factory=list)

    def write(self, path: Path | None) -> None:
        """Write everything so far, so that an interrupted run keeps what it has; no path, no file."""
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def environment(device: torch.device, dtype: torch.dtype, scale: str) -> dict[str, Any]:
    """What the numbers depend on."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "kind": device.type,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "scale": scale,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        **{name: _version(name) for name in ("triton", "transformers", "flash-linear-attention", "scattermoe")},
        "sma": sma.__version__,
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit that is checked out, with a ``+`` where files were changed since."""
    try:
        return _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
