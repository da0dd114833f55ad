"""lm-eval judges a trained model on a task of local files: choices, bits per byte, written text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import sma
from sma_models.integrations.hf import export

pytestmark = [pytest.mark.lm_eval, pytest.mark.filterwarnings("default")]  # the warnings of others

SENTENCE = "the quick brown fox jumps over the lazy dog. "
TASKS: dict[str, dict[str, Any]] = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "pages": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": [" "], "max_gen_toks": 10, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No task, data set or metric may be fetched. Set before the first import of the packages that read it."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """The folder of a model that knows one sentence by heart."""
    torch.manual_seed(0)
    model = sma.build("seqboat_small_lm", "n_layers=2", "d_model=32")
    text = torch.tensor([list(("\n" + SENTENCE * 4).encode())])
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(80):
        loss = F.cross_entropy(model(text[:, :-1]).logits[0], text[0, 1:])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return export(model.eval(), tmp_path / "model")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder of tasks, with their data."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    line = {"question": "the quick brown ", "choices": ["zzz", "fox", "dog"], "answer": 1, "text": SENTENCE * 3}
    (folder / "data.jsonl").write_text(json.dumps(line) + "\n")
    for name, task in TASKS.items():
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}},
            "test_split": "test",
            "target_delimiter": "",
            "metadata": {"version": 1},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | task))
    return folder


def test_a_trained_model_is_judged(trained: Path, tasks: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(trained), "prefix_token_id": 10, "trust_remote_code": True, "max_length": 1024},
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
        batch_size=3,
        bootstrap_iters=0,
    )["results"]
    assert found["choices"]["acc,none"] == 1.0
    assert found["writing"]["exact_match,none"] == 1.0
    # The bits per byte that the plain model gives the text after a line feed.
    plain = AutoModelForCausalLM.from_pretrained(trained).model
    text = torch.tensor([list(("\n" + SENTENCE * 3).encode())])
    bits = F.cross_entropy(plain(text[:, :-1]).logits[0], text[0, 1:]).item() / math.log(2)
    assert found["pages"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-3)
