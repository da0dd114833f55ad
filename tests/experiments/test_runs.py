"""Runs of a queue: interrupted, carried elsewhere, finished there as if nothing had been; collected, and shown."""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import packing, results
from experiments.__main__ import main, run_queue
from experiments.plan import read_queue
from experiments.tables import table

FOREVER = 1e12
DEFAULTS = {"minutes": 60, "together": 2, "only": "", "carried": None, "pack": None, "retry": False, "commit": "abc"}


def run(root: Path, out: Path, clock: Callable[[], float] = time.monotonic, **given: Any) -> int:
    """``python -m experiments run``, with a clock of the test's."""
    options = argparse.Namespace(**{**DEFAULTS, "root": root, "out": out, **given})
    return run_queue(options, deadline=time.monotonic() + 3600, clock=clock)


def record(out: Path, variant: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "results" / f"which.lines.{variant}.s0.json").read_text())
    return content


@pytest.fixture
def until_logged(tmp_path: Path) -> Callable[[], float]:
    """A clock by which the time is up as soon as a run in the folder ``first`` has logged some steps."""

    def clock() -> float:
        files = list(tmp_path.glob("first/runs/*/*/metrics.csv"))
        enough = any(len(file.read_text().splitlines()) > 3 for file in files)
        return FOREVER if enough else time.monotonic()

    return clock


def test_interrupted_and_carried_elsewhere(
    root: Path, tmp_path: Path, until_logged: Callable[[], float], capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "queue.yaml").write_text("- {experiment: which, task: lines, variants: [always], seeds: [0]}\n")
    first, second, whole = (tmp_path / name for name in ("first", "second", "whole"))
    assert run(root, first, until_logged) == 0
    partial = record(first, "always")
    assert 0 < partial["steps"] < 300
    assert not partial["finished"]
    assert partial["wall_seconds"] > 0

    carried = tmp_path / "carried"
    carried.mkdir()
    for name in ("results.tar", "checkpoints.tar"):
        shutil.move(first / name, carried / name)
    # A call that works on other runs carries these on.
    again = tmp_path / "again"
    assert run(root, tmp_path / "elsewhere", carried=carried, pack=again, only="other") == 0
    capsys.readouterr()
    assert run(root, second, carried=again) == 0
    assert f"start which.lines.always.s0 ({partial['steps']} of 300 steps done)" in capsys.readouterr().out
    assert not (second / "checkpoints.tar").exists()
    assert run(root, whole) == 0
    resumed, uninterrupted = record(second, "always"), record(whole, "always")
    assert resumed["finished"]
    assert resumed["steps"] == 300
    assert resumed["commit"] == "abc"
    assert resumed["wall_seconds"] > partial["wall_seconds"]
    assert resumed["final"] == uninterrupted["final"]
    assert resumed["rates"] == uninterrupted["rates"]
    assert set(resumed["rates"]["layers.0.activate"]) == {1}
    assert resumed["curve"].pop("seconds") != uninterrupted["curve"].pop("seconds")
    assert resumed["curve"] == uninterrupted["curve"]
    assert resumed["curve"]["step"][-1] == 300
    assert len(resumed["curve"]["step"]) <= results.POINTS + 3


def test_finished_runs_are_collected_and_shown(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out, packed = tmp_path / "out", tmp_path / "packed"
    path = root / "which" / "experiment.yaml"
    path.write_text(path.read_text().replace("steps: 300", "steps: 20"))
    (root / "queue.yaml").write_text("- {experiment: which, task: lines, seeds: [0, 1]}\n")
    assert run(root, out, pack=packed) == 0
    assert [file.name for file in packed.iterdir()] == ["results.tar"]

    assert main(["--root", str(root), "collect", str(packed)]) == 0
    folder = root / "which" / "results"
    assert {file.name for file in (folder / "lines").iterdir()} == {
        f"{v}-s{s}.json" for v in ("never", "always") for s in (0, 1)
    }
    with open(folder / "lines.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["variant"], row["seed"], row["steps"]) for row in rows] == [
        (variant, seed, "20") for variant in ("never", "always") for seed in ("0", "1")
    ]
    assert [float(row["rate"]) for row in rows] == [0, 0, 1, 1]
    assert all(float(row["test_bits_per_byte"]) > 0 for row in rows)

    capsys.readouterr()
    assert main(["--root", str(root), "table", "which"]) == 0
    shown = capsys.readouterr().out
    assert "| always | 2 | " in shown
    assert "| 100.0 ± 0.0 | 100 100 |" in shown
    for name in ("lines.png", "lines-rates.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")

    # What is done is not done again, wherever the results lie.
    assert main(["--root", str(root), "status"]) == 0
    assert capsys.readouterr().out.count("done") == 4
    assert run(root, tmp_path / "fresh") == 0
    assert not list((tmp_path / "fresh").glob("runs/*/*"))
    # Another definition is another run.
    path.write_text(path.read_text().replace("steps: 20", "steps: 21"))
    assert main(["--root", str(root), "status"]) == 0
    assert capsys.readouterr().out.count("todo") == 4
    assert table("which", root) == "which: no results yet"
    assert main(["--root", str(root), "collect", str(packed)]) == 0
    assert capsys.readouterr().err.count("left out") == 4


def test_a_run_that_fails_is_named_and_the_others_go_on(root: Path, tmp_path: Path) -> None:
    path = root / "which" / "experiment.yaml"
    text = path.read_text().replace("steps: 300", "steps: 6")
    path.write_text(text.replace("type: fixed_rate, rate: 0.0", "type: fixed_rate, rate: 2.0"))
    out = tmp_path / "out"
    assert run(root, out, together=1) == 1
    assert "rate: must lie in [0, 1], got 2.0" in record(out, "never")["failed"]
    assert record(out, "always")["finished"]
    never, always = read_queue(root)
    assert results.state(results.best(never, out, root)) == "failed"
    assert results.state(results.best(always, out, root)) == "done"


def test_a_bad_queue_is_an_error_of_one_line(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "queue.yaml").write_text("- {experiment: which, task: lines, variants: [newer], seeds: [0]}\n")
    assert main(["--root", str(root), "run", "--minutes", "1", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.endswith("[0].variants[0]: must be one of never, always, got 'newer'; did you mean 'never'?\n")
    (root / "queue.yaml").write_text("[]")
    assert main(["--root", str(root), "collect", str(tmp_path)]) == 2
    assert "must hold results" in capsys.readouterr().err


def test_checkpoints_are_packed_within_the_limit(tmp_path: Path) -> None:
    sizes = {"a": 30_000, "b": 30_000, "c": 20_000, "d": 90_000}
    for name, size in sizes.items():
        (tmp_path / "runs" / "r" / name / "checkpoints").mkdir(parents=True)
        (tmp_path / "runs" / "r" / name / "checkpoints" / "last.safetensors").write_bytes(bytes(size))
        (tmp_path / "runs" / "r" / name / "config.yaml").write_text(name)
    runs = [tmp_path / "runs" / "r" / name for name in sizes]
    out = tmp_path / "out"
    assert packing.pack_checkpoints(tmp_path, runs, out, limit=70_000) == [runs[3]]
    packed = sorted(out.iterdir())
    assert [file.name for file in packed] == ["checkpoints-2.tar", "checkpoints.tar"]
    assert all(file.stat().st_size <= 70_000 for file in packed)
    names = []
    for file in packed:
        with tarfile.open(file) as tar:
            names += tar.getnames()
    assert sorted(names) == sorted(
        f"runs/r/{name}/{file}" for name in "abc" for file in ("checkpoints/last.safetensors", "config.yaml")
    )
    assert packing.unpack(out, tmp_path / "other") == 6
    assert (tmp_path / "other" / "runs" / "r" / "c" / "config.yaml").read_text() == "c"
    assert packing.unpack(out, tmp_path / "other") == 0
