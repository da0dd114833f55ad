"""A recipe that trains in a second, and small files in the official layouts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sma_models.training.loop import Outcome, train
from sma_models.training.recipe import load_recipe, recipe_name
from sma_models.training.run import Run
from tests.training.data.conftest import cifar, reviews, speech_root  # noqa: F401  # fixtures, used by their names

TINY = """
model:
  type: language_model
  vocab_size: 256
  d_model: 16
  n_layers: 2
  dropout: 0.1
  final_norm: layernorm
  blocks:
    - type: seqboat
      dropout: 0.1
      mixer: {type: ema, n_state: 2}
      activate:
        controller: {target: 0.4, gain: 0.5}
        module: {type: gau, d_qk: 8, d_v: 32, window: 8, positions: rotary}
data: {type: files, root: ROOT, seq_len: 24, fractions: [0.1, 0.1]}
optimiser: {algorithm: radam, lr: 0.01, warmup: 5, weight_decay: 0.01}
train:
  steps: 30
  batch_size: 4
  accumulate: 2
  eval_every: 8
  eval_batches: 2
  checkpoint_every: 1
  log_every: 1
  device: cpu
"""


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """Path of a recipe for a byte-level language model of two layers, with dropout and a rate controller."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {n} is followed by line {n + 1}.\n" for n in range(120)))
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(TINY.replace("ROOT", str(text)))
    return str(recipe)


@pytest.fixture
def run_recipe(tmp_path: Path) -> Callable[..., tuple[Run, Outcome]]:
    """Trains a recipe with overrides in a new folder."""

    def run(source: str, *overrides: str, name: str = "run") -> tuple[Run, Outcome]:
        recipe = load_recipe(source, *overrides)
        made = Run.create(tmp_path / "runs", recipe_name(source), recipe, name)
        return made, train(made, recipe)

    return run
