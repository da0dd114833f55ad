"""A folder of experiments with one of its own, whose runs take seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

RECIPE = """
model:
  type: language_model
  vocab_size: 256
  d_model: 16
  n_layers: 2
  final_norm: layernorm
  blocks:
    - type: seqboat
      mixer: {type: ema, n_state: 2}
      activate:
        module: {type: gau, d_qk: 8, d_v: 32, window: 8, positions: rotary}
data: {type: files, root: ROOT, seq_len: 24, fractions: [0.1, 0.1]}
optimiser: {lr: 0.01, warmup: 5}
train: {steps: 10, batch_size: 4, eval_every: 100, eval_batches: 2, checkpoint_every: 50, log_every: 2, device: cpu}
"""
EXPERIMENT = """
question: Which is better?
tasks:
  lines: {recipe: RECIPE, steps: 300, overrides: [data.seq_len=20]}
variants:
  never: ["model.blocks[0].activate.configurator={type: fixed_rate, rate: 0.0}"]
  always: ["model.blocks[0].activate.configurator={type: always}"]
"""
QUEUE = "- {experiment: which, task: lines, seeds: [0]}\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder of experiments: one with two variants, both in the queue."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {n} is followed by line {n + 1}.\n" for n in range(120)))
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(RECIPE.replace("ROOT", str(text)))
    folder = tmp_path / "experiments"
    (folder / "which").mkdir(parents=True)
    (folder / "which" / "experiment.yaml").write_text(EXPERIMENT.replace("RECIPE", str(recipe)))
    (folder / "queue.yaml").write_text(QUEUE)
    return folder
