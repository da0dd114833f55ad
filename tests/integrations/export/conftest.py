"""A small language model of bytes that has learned a little, and itself as an exported folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import sma
from sma_models.integrations.export import export_prefill, export_step, save
from sma_models.language_model import LanguageModel

TEXT = "".join(f"line {n} is followed by line {n + 1}.\n" for n in range(400)).encode()


@pytest.fixture(scope="package")
def trained() -> LanguageModel:
    """Reads lines that count; attention with a window, in every layer on some of the bytes."""
    torch.manual_seed(0)
    model: LanguageModel = sma.build(
        "seqboat_small_lm", "d_model=24", "n_layers=1", "blocks[0].activate.module={d_qk: 8, d_v: 32, window: 12}"
    )
    text, optimiser = torch.tensor(list(TEXT)), torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(80):
        start = torch.randint(len(text) - 65, (8, 1)) + torch.arange(65)
        logits = model(text[start[:, :-1]]).logits
        loss = F.cross_entropy(logits.flatten(0, 1), text[start[:, 1:]].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


@pytest.fixture(scope="package")
def folder(trained: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model for ONNX Runtime: prompts in chunks of 20 tokens, two at a time, and steps of any number."""
    graphs = {"prefill": export_prefill(trained, 2, 20), "step": export_step(trained)}
    return save(graphs, tmp_path_factory.mktemp("exported") / "onnx")
