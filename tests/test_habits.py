"""What the checks around the code refuse: scratch files, commit messages without a reason, a broken workflow."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
REASON = "\n\nBecause it was slow."


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with the script that looks at tracked files."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "tracked_files", tmp_path / ".ci")
    assert run("git", "init", "-q", cwd=tmp_path).returncode == 0
    return tmp_path


@pytest.mark.parametrize(
    "name", ["READ_NOW_2.md", "do_not_commit.txt", "a/scratch_pad.py", "layer.py.orig", "layer.rej"]
)
def test_a_tracked_scratch_file_is_refused(repository: Path, name: str) -> None:
    path = repository / name
    path.parent.mkdir(exist_ok=True)
    path.touch()
    assert run(".ci/tracked_files", cwd=repository).returncode == 0, "a file that is not tracked may lie about"
    run("git", "add", name, cwd=repository)
    result = run(".ci/tracked_files", cwd=repository)
    assert result.returncode == 1
    assert name in result.stderr


def test_other_files_are_accepted(repository: Path) -> None:
    (repository / "from_scratch").mkdir()
    for name in ("layer.py", "origin.md", "from_scratch/train.py"):
        (repository / name).touch()
    run("git", "add", ".", cwd=repository)
    assert run(".ci/tracked_files", cwd=repository).returncode == 0


def test_this_repository_tracks_no_scratch_file() -> None:
    result = run(".ci/tracked_files")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ("Router: one kernel" + REASON, ""),
        ("x" * 72 + REASON, ""),
        ("x" * 73 + REASON, "73 characters"),
        ("Router: one kernel", "no body"),
        ("Router: one kernel\n\n# On branch main", "no body"),
        ("Router: one kernel\nBecause it was slow.", "line 2"),
        ("Merge branch 'parts'", ""),
    ],
)
def test_a_commit_message_says_what_and_why(tmp_path: Path, message: str, complaint: str) -> None:
    file = tmp_path / "message"
    file.write_text(f"{message}\n", encoding="utf-8")
    result = run(".ci/commit_message", str(file))
    assert result.returncode == bool(complaint)
    assert complaint in result.stderr


def test_the_workflow_calls_the_checks() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    assert {"pull_request", "push"} == set(workflow[True])  # YAML 1.1 reads the key "on" as true
    (job,) = workflow["jobs"].values()
    assert job["runs-on"] == "ubuntu-latest"
    steps = job["steps"]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    assert ".ci/run" in [step.get("run") for step in steps]
    python = next(step["with"] for step in steps if step.get("uses", "").startswith("actions/setup-python@"))
    assert python["python-version"] == "3.11"
    assert python["cache"] == "pip"


def test_hooks_call_what_is_there() -> None:
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    scripts = [hook["entry"] for hook in local["hooks"] if hook["entry"].startswith(".ci/")]
    assert scripts
    assert [entry for entry in scripts if not (ROOT / entry).is_file()] == []
