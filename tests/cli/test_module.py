"""``python -m sma_models`` is the ``sma`` command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sma import __version__

ROOT = Path(__file__).parents[2]


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


@pytest.mark.parametrize("module", ["sma_models", "sma_models.cli"])
def test_the_package_is_the_command(module: str) -> None:
    said = run(module, "--version")
    assert (said.returncode, said.stdout.strip(), said.stderr) == (0, f"sma {__version__}", "")


def test_training_by_the_package() -> None:
    said = run("sma_models", "train", "lm_stdlb")
    assert said.returncode == 2
    assert said.stdout == ""
    assert said.stderr.startswith("error: ")
    assert "no recipe named 'lm_stdlb'; did you mean 'lm_stdlib'" in said.stderr
