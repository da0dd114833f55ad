"""Prompts, and what models and folders write after them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from sma_models.inference.generation import generate
from sma_models.integrations.export import Runner
from sma_models.language_model import LanguageModel
from tests.integrations.export.conftest import TEXT

PROMPTS = [list(b"line 7 is"), list(TEXT[:50]), list(b"l"), list(TEXT[100:141]), list(b"is followed by")]
"""Longer and shorter than a chunk of 20, and more than two."""


def expected(model: LanguageModel, prompts: list[list[int]], count: int) -> list[list[int]]:
    """What the model itself writes, greedily."""
    longest, device = max(map(len, prompts)), model.embedding.weight.device
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts]).to(device)
    valid = torch.arange(longest) >= longest - torch.tensor([[len(prompt)] for prompt in prompts])
    written: list[list[int]] = generate(model, tokens, count, valid=valid.to(device), temperature=0).tolist()
    return written


def written(runner: Runner, prompts: list[list[int]], count: int) -> list[list[int]]:
    """What a folder writes, greedily."""
    stream = runner.stream(prompts)
    return np.array([next(stream).tolist() for _ in range(count)]).T.tolist()  # type: ignore[no-any-return]


def written_alone(folder: Path, prompt: str, *options: str, without: tuple[str, ...]) -> str:
    """What the copy of the runner in a folder writes, with a Python that lacks some packages."""
    missing = ", ".join(f"{name}=None" for name in without)
    code = f"import runpy, sys; sys.modules.update({missing}); sys.argv = sys.argv[1:]; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(folder / "runner.py"), prompt, *options]
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout
