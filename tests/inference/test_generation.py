"""Generated tokens are those of the parallel model, however the prompt was prefilled, at constant memory."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor

from sma.errors import ConfigError, ShapeError, StreamingError
from sma_models.inference.generation import generate, sample, stream
from sma_models.language_model import LanguageModel
from sma_models.stack import Stack
from tests.models.tiny import SPECS, inputs_of, tiny

every_language_model = pytest.mark.parametrize("name", [name for name in SPECS if name.endswith("_lm")])
PROMPT_LENGTHS = [11, 4, 1]


@pytest.fixture
def model() -> LanguageModel:
    loaded: LanguageModel = tiny("seqboat_small_lm")
    return loaded


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Prompts in one batch, with anything at all as padding."""
    width = max(len(row) for row in rows)
    tokens = torch.full((len(rows), width), 7)
    valid = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        tokens[i, place], valid[i, place] = row, True
    return tokens, valid


@every_language_model
def test_greedy_is_the_argmax_of_the_parallel_model(name: str) -> None:
    model = tiny(name)
    prompt = inputs_of(model, length=9)
    drawn = generate(model, prompt, 12, temperature=0)
    assert drawn.shape == (3, 12)
    assert drawn.dtype == torch.int64
    with torch.no_grad():
        expected = model(torch.cat([prompt, drawn], 1)).logits[:, 8:-1].argmax(-1)
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("side", ["left", "right"])
@every_language_model
def test_a_batch_of_prompts_is_each_prompt_alone(name: str, side: str) -> None:
    model = tiny(name)
    rows = [inputs_of(model, batch=1, length=length, seed=length)[0] for length in PROMPT_LENGTHS]
    tokens, valid = padded(rows, side)
    for chunk in (2048, 3):
        together = generate(model, tokens, 8, valid=valid, temperature=0, prefill_chunk=chunk)
        for row, drawn in zip(rows, together, strict=True):
            assert torch.equal(generate(model, row[None], 8, temperature=0)[0], drawn)


def test_the_size_of_chunks_makes_no_difference(model: LanguageModel) -> None:
    prompt = inputs_of(model, length=23)
    generators = [torch.Generator().manual_seed(5) for _ in range(5)]
    drawn = [
        generate(model, prompt, 10, prefill_chunk=chunk, generator=generator)
        for chunk, generator in zip((1, 2, 22, 23, 100), generators, strict=True)
    ]
    assert all(torch.equal(each, drawn[0]) for each in drawn)


def test_a_seed_repeats_and_another_does_not(model: LanguageModel) -> None:
    prompt = inputs_of(model)
    first, again, other = (
        generate(model, prompt, 10, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_memory_does_not_grow(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    forward = Stack.forward

    def watched(stack: Stack, *args: Any, **options: Any) -> Any:
        out = forward(stack, *args, **options)
        assert out.state is not None
        assert not out.x.requires_grad
        sizes.append(out.state.nbytes)
        return out

    monkeypatch.setattr(Stack, "forward", watched)  # of the class: a stack with a forward of its own would be called
    drawn = list(islice(stream(model, inputs_of(model, length=40), prefill_chunk=8), 60))
    assert len(drawn) == 60
    assert len(sizes) == 40 // 8  # the prompt; the rest is decoded in memory that was there before
    assert max(sizes) == sizes[0]


def test_gradients_are_on_again_between_tokens(model: LanguageModel) -> None:
    for _ in islice(stream(model, inputs_of(model)), 2):
        assert torch.is_grad_enabled()


LOGITS = torch.tensor([0.0, 3.0, 1.0, 2.0, -float("inf"), 1.0])


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({}, [0, 1, 2, 3, 5]),
        ({"temperature": 2.0}, [0, 1, 2, 3, 5]),
        ({"temperature": 0.5, "top_k": 3}, [1, 3, 2]),  # of two equals the first
        ({"top_k": 1}, [1]),
        ({"top_k": 100}, [0, 1, 2, 3, 5]),
        ({"top_p": 0.55}, [1]),  # holds 0.59
        ({"top_p": 0.7}, [1, 3]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 5]),
        ({"top_p": 1e-9}, [1]),
        ({"top_k": 2, "top_p": 0.99}, [1, 3]),
        ({"temperature": 0.0}, [1]),
        ({"temperature": 1e-40}, [1]),
        ({"temperature": 1e30}, [0, 1, 2, 3, 5]),
    ],
    ids=str,
)
def test_tokens_are_drawn_with_their_probabilities(options: dict[str, Any], allowed: list[int]) -> None:
    n = 40_000
    drawn = sample(LOGITS.expand(n, -1), generator=torch.Generator().manual_seed(0), **options)
    found = drawn.bincount(minlength=6).double() / n
    expected = torch.zeros(6, dtype=torch.float64)
    kept = torch.tensor(allowed)
    shifted = (LOGITS[kept] - 3.0).double() / (options.get("temperature", 1.0) or 1.0)
    expected[kept] = shifted.softmax(0)
    assert set(drawn.unique().tolist()) <= set(allowed)
    assert float((found - expected).abs().max()) < 4 * 0.5 / n**0.5  # four standard errors


def test_low_precision_and_large_logits_can_be_drawn_from() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        logits = torch.tensor([[60000.0, 59000.0, -60000.0]]).to(dtype)
        assert sample(logits, temperature=0.01).tolist() == [0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature: must be 0 or a positive number, got -0.1"),
        ({"temperature": float("nan")}, "temperature: .* got nan"),
        ({"temperature": float("inf")}, "temperature: .* got inf"),
        ({"top_k": 0}, "top_k: must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p: must lie in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, "top_p: .* got 1.1"),
        ({"top_p": float("nan")}, "top_p: .* got nan"),
        ({"prefill_chunk": 0}, "prefill_chunk: must be at least 1, got 0"),
        ({"prefill_chunk": -5}, "prefill_chunk: must be at least 1, got -5"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_before_any_work(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(model, "forward", None)
    prompt = inputs_of(model)
    with pytest.raises(ConfigError, match=message):
        stream(model, prompt, **options)
    with pytest.raises(ConfigError, match=message):
        generate(model, prompt, 0, **options)
    if "prefill_chunk" not in options:
        with pytest.raises(ConfigError, match=message):
            sample(torch.zeros(1, 3), **options)


@pytest.mark.parametrize(
    ("prompt", "valid", "error", "message"),
    [
        (torch.zeros(2, 0, dtype=torch.int64), None, ConfigError, r"at least one real token, got shape \(2, 0\)"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[True] * 3, [False] * 3]), ConfigError, "every row needs"),
        (torch.zeros(3, dtype=torch.int64), None, ShapeError, r"prompt: tokens must be integers of shape \(B, L\)"),
        (torch.zeros(2, 3), None, ShapeError, "prompt: tokens must be integers .* got torch.float32"),
        (torch.zeros(0, 3, dtype=torch.int64), None, ShapeError, "prompt: the batch must hold at least one sequence"),
        (torch.full((2, 3), 16), None, ShapeError, r"prompt: tokens must lie in 0\.\.15, got 16"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3), ShapeError, "valid: must be bool"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, dtype=torch.bool), ShapeError, "valid: must be bool"),
    ],
    ids=["empty", "padding", "one row", "floats", "no rows", "out of range", "mask dtype", "mask shape"],
)
def test_prompts_that_are_none_are_refused(
    model: LanguageModel, prompt: Tensor, valid: Tensor | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        stream(model, prompt, valid=valid)


def test_a_negative_number_of_tokens_is_refused(model: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="max_new_tokens: must not be negative, got -1"):
        generate(model, inputs_of(model), -1)
    assert generate(model, inputs_of(model), 0).shape == (3, 0)


def test_a_model_that_cannot_stream_says_so_at_once() -> None:
    with pytest.raises(StreamingError, match=r"cannot stream: .*no bounded memory"):
        stream(tiny("seqboat_small_lm", blocks=unbounded()), torch.zeros(1, 2, dtype=torch.int64))


def unbounded() -> Any:
    import sma
    from tests.models.tiny import shrink

    return shrink(sma.load_spec("seqboat_small_lm", "blocks[0].activate.module.window=null")).blocks  # type: ignore[attr-defined]
