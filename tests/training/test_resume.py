"""A run that was killed goes on as if it had not been: the same losses, bit for bit."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sma.errors import CheckpointError, ConfigError
from sma_models.cli import main
from sma_models.training.checkpoint import read_checkpoint
from sma_models.training.journal import cut_back
from sma_models.training.loop import Outcome, train
from sma_models.training.recipe import load_recipe
from sma_models.training.run import Run

Runner = Callable[..., tuple[Run, Outcome]]


def losses(run: Run) -> list[dict[str, str]]:
    """The log without the clock, as text: equal means equal in every bit."""
    with open(run.metrics, newline="") as file:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(file)]


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    program = "import sys, torch; torch.set_num_threads(1); from sma_models.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for_rows(run: Run, rows: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if run.metrics.exists() and run.metrics.read_bytes().count(b"\n") > rows:
            return
        time.sleep(0.001)


def test_killed_and_stopped_run_gives_the_same_losses(tiny: str, tmp_path: Path, run_recipe: Runner) -> None:
    reference, _ = run_recipe(tiny, name="reference")
    runs = tmp_path / "killed"
    run = Run(runs / "tiny" / "x")
    moments = random.Random(1)
    process = start("train", tiny, "--name", "x", "--runs", str(runs))
    for number in (signal.SIGKILL, signal.SIGTERM):
        done = len(losses(run)) if run.metrics.exists() else 0
        wait_for_rows(run, done + moments.randrange(2, 8), process)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 128 + signal.SIGTERM}[number]
        assert not run.finished
        assert read_checkpoint(run.checkpoint).progress.step >= 1
        if number == signal.SIGTERM:
            assert f"go on with: sma train --resume {run.path}" in said
        else:
            process = start("train", "--resume", str(run.path))
    outcome = train(run, run.recipe())
    assert outcome.step == 30
    assert losses(run) == losses(reference)
    assert [row["step"] for row in losses(run)] == [str(step) for step in range(1, 31)]
    left, right = run.model().state_dict(), reference.model().state_dict()
    assert all(torch.equal(left[name], right[name]) for name in right)
    assert not list(run.checkpoint.parent.glob(".*"))


def test_every_step_can_be_gone_on_from(tiny: str, tmp_path: Path, run_recipe: Runner) -> None:
    """Also when the log is ahead of the checkpoint, or its last line was cut off."""
    reference, _ = run_recipe(tiny, "train.checkpoint_every=4", "train.steps=10", name="reference")
    rows = losses(reference)
    run, _ = run_recipe(tiny, "train.checkpoint_every=4", "train.steps=10", name="again")
    run.summary.unlink()
    run.weights.unlink()
    full = run.metrics.read_text()
    run.metrics.write_text(full[: len(full) - 20])
    recipe = run.recipe()
    run.checkpoint.unlink()  # killed before the first checkpoint
    begun = run.metrics.read_text()
    train(run, recipe)
    assert losses(run) == rows
    assert (run.path / "metrics.1.csv").read_text() == begun, "what a lost run logged is kept"


@pytest.mark.parametrize("whole_folder", [False, True])
def test_a_run_whose_checkpoint_is_gone_is_not_begun_anew(
    whole_folder: bool, tiny: str, run_recipe: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = run_recipe(tiny, "train.checkpoint_every=4", "train.steps=10")
    run.summary.unlink()
    run.checkpoint.unlink()
    if whole_folder:
        run.checkpoint.parent.rmdir()
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert main(["train", "--resume", str(run.path)]) == 2
    said = capsys.readouterr().err
    assert f"{run.checkpoint}: must be there to resume a run that got to step 10" in said
    assert f"sma train {run.path.parent.name} --name NEW" in said
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_a_run_killed_before_its_first_checkpoint_is_resumed(tiny: str, run_recipe: Runner) -> None:
    run, _ = run_recipe(tiny, "train.checkpoint_every=100", "train.steps=6")
    rows = losses(run)
    run.summary.unlink()
    run.checkpoint.rename(run.checkpoint.with_name(f".{run.checkpoint.name}.1.tmp"))  # while it was being written
    unfinished = [run.checkpoint.parent / ".tmpAb12", run.path / ".tmpCd34", run.path / ".metrics.csv.1.tmp"]
    for file in unfinished:
        file.write_bytes(b"of a process that was killed")
    assert main(["train", "--resume", str(run.path)]) == 0
    assert losses(run) == rows
    assert not any(file.exists() for file in unfinished)
    assert [file.name for file in run.checkpoint.parent.iterdir()] == [run.checkpoint.name]


def test_a_run_killed_after_the_last_step_only_writes_its_results(tiny: str, run_recipe: Runner) -> None:
    run, first = run_recipe(tiny, "train.steps=6")
    before = run.metrics.read_text()
    run.summary.unlink()
    run.weights.unlink()
    second = train(run, run.recipe())
    assert first.summary is not None
    assert second.summary is not None
    assert second.summary["test"] == first.summary["test"]
    assert run.metrics.read_text() == before


def test_a_finished_run_is_left_alone(tiny: str, run_recipe: Runner) -> None:
    run, _ = run_recipe(tiny, "train.steps=6")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="finished"):
        train(run, run.recipe())
    with pytest.raises(ConfigError, match="name: must be new"):
        run_recipe(tiny, "train.steps=6")
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


def test_one_process_at_a_time(tiny: str, tmp_path: Path) -> None:
    recipe = load_recipe(tiny)
    run = Run.create(tmp_path / "runs", "tiny", recipe, "x")
    with run.locked(), pytest.raises(ConfigError, match="another process"):
        train(run, recipe)


@pytest.mark.parametrize("damage", ["truncated", "empty", "of another model", "no checkpoint"])
def test_a_bad_checkpoint_is_refused_and_kept(damage: str, tiny: str, run_recipe: Runner) -> None:
    run, _ = run_recipe(tiny, "train.steps=6")
    run.summary.unlink()
    content = run.checkpoint.read_bytes()
    recipe = run.recipe()
    if damage == "of another model":
        recipe = run.recipe("model.n_layers=1")
    elif damage == "no checkpoint":
        content = run.weights.read_bytes()
    else:
        content = content[: len(content) // 2 if damage == "truncated" else 0]
    run.checkpoint.write_bytes(content)
    with pytest.raises(CheckpointError, match=str(run.checkpoint)):
        train(run, recipe)
    assert run.checkpoint.read_bytes() == content


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    log = tmp_path / "metrics.csv"
    log.write_text("step,loss\n1,2.0\n2,1.5\n3,1.2\n4,1.")
    cut_back(log, 2)
    assert log.read_text() == "step,loss\n1,2.0\n2,1.5\n"
    log.write_text("loss\n1\n")
    with pytest.raises(CheckpointError, match="step"):
        cut_back(log, 1)
