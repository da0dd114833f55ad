"""Transformers' ways on a GPU: the same tokens as the library generates there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sma_models.inference.generation import generate
from sma_models.language_model import LanguageModel
from tests.integrations.hf.test_generation import GREEDY, PROMPT, padded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device_map", ["cuda", "auto"])
def test_a_loaded_model_writes_what_the_library_writes(
    folder: Path, plain: LanguageModel, device_map: str, dtype: torch.dtype
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, dtype=dtype)
    assert {(each.device.type, each.dtype) for each in model.parameters()} == {("cuda", dtype)}
    prompt = PROMPT.cuda()
    written = model.generate(prompt, **GREEDY)
    expected = generate(plain.to("cuda", dtype), prompt, 20, temperature=0)
    assert torch.equal(written[:, prompt.shape[1] :], expected)
    assert model._shared_decoder.captured


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}, {"prefill_chunk_size": 5}], ids=str)
def test_left_padded_prompts(folder: Path, options: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cuda", dtype=torch.float32)
    rows = [list(b"a longer beginning"), list(b"short"), list(b"x")]
    tokens, mask = (each.cuda() for each in padded(rows, 0))
    batch = model.generate(tokens, attention_mask=mask, **GREEDY, **options)[:, tokens.shape[1] :]
    for row, written in zip(rows, batch, strict=True):
        alone = model.generate(torch.tensor([row], device="cuda"), **GREEDY, **options)[0, len(row) :]
        assert torch.equal(written, alone)


def test_logits_are_those_of_the_cpu(folder: Path) -> None:
    tokens = torch.randint(256, (2, 300))
    on_cpu, on_gpu = (AutoModelForCausalLM.from_pretrained(folder, device_map=each) for each in ("cpu", "cuda"))
    with torch.no_grad():
        torch.testing.assert_close(on_gpu(tokens.cuda()).logits.cpu(), on_cpu(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_prompts(folder: Path, plain: LanguageModel, dtype: torch.dtype) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cuda", dtype=dtype)
    prompt = torch.randint(256, (1, 9000), device="cuda")
    for _ in range(2):  # the second time from graphs only
        written = model.generate(prompt, **GREEDY)
        expected = generate(plain.to("cuda", dtype), prompt, 20, temperature=0)
        assert torch.equal(written[:, prompt.shape[1] :], expected)
    assert model._shared_decoder.prefill_captured
