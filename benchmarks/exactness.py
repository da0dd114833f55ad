"""One sequence, processed in every way: how far the logits are from those of one parallel pass, and whether the greedy
continuations are the same bytes.

Every way processes the whole sequence, the token by token ones too. Steps of a decoder, a server's and those of
Transformers go through the code that users call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.tables import EXACT_HEAD, GREEDY_HEAD, exact_cells, exact_title, greedy_cells, text_table
from sma.routing import Routing
from sma_models.inference import Decoder
from sma_models.inference.engine import Engine
from sma_models.inference.generation import generate
from sma_models.inference.messages import (
    Event,
    GenerationRequest,
    PromptPrefilled,
    RequestFailed,
    RequestOptions,
    TokenGenerated,
)
from sma_models.inference.sampling import Sampling
from sma_models.integrations.hf import SMACache, SMAForCausalLM, from_model
from sma_models.language_model import LanguageModel
from sma_models.serving.limits import Limits
from sma_models.training.data import stdlib

TOKENS = 100_000
CHUNK = 2048
"""Prompts are prefilled in such chunks, as by :func:`sma_models.inference.generation.generate` and by Transformers."""
POINTS = (1_000, 10_000)
"""Points along the sequence that are reported, besides its end."""
GREEDY = 200
"""Tokens that are generated after each point."""

Say = Callable[[str], None]


class Passed(NamedTuple):
    """The result of one way for n tokens: logits ``(n, V)``, and the active modules ``(n, M)`` of each layer that
    reports them.
    """

    logits: Tensor
    active: Mapping[str, Tensor]


def read_model(run: str, runs: Path, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """The language model of a run, a file of weights, or a folder of Transformers.

    Raises:
        SMAError: there is none.
    """
    from sma_models.cli.serve import load_model

    if (Path(run) / "config.json").is_file():
        loaded: LanguageModel = SMAForCausalLM.from_pretrained(run).model
        return loaded.to(device, dtype).eval()
    model, _ = load_model(run, runs, str(device), "float32")
    assert isinstance(model, LanguageModel)
    return model.to(dtype)


def read_text(file: Path | None, tokens: int) -> bytes:
    """So many bytes of a file; by default of what a run of ``lm_stdlib`` has not seen.

    Raises:
        ValueError: there are fewer.
    """
    text = stdlib.load().test.data.tobytes() if file is None else file.read_bytes()
    if len(text) < tokens:
        raise ValueError(f"tokens: must be at most the {len(text)} bytes of the text, got {tokens}")
    return text[:tokens]


def exactness(model: LanguageModel, text: bytes, say: Say = print) -> dict[str, Any]:
    """Process a sequence in every way, and generate from points along it.

    Args:
        model: of bytes, in evaluation mode.
        text: the bytes of the sequence.
        say: gets the findings, line by line.

    Returns:
        For the results: sizes, for each way the largest difference of a logit from that of the parallel pass, in all of
        the sequence and up to points along it, also as a share of logits that are larger than 1, and decisions that
        differ; for each point how many tokens of the greedy continuations are the same.
    """
    weight = model.embedding.weight
    tokens = torch.tensor([list(text)], device=weight.device)
    whole = _collect([_of(*_parallel(model, tokens))])
    largest = float(whole.logits.abs().max())
    rows = []
    for name, run in _ways(model).items():
        row = {"way": name, **_difference(_collect(run(tokens)), whole)}
        rows.append(row)
        say(f"{name}: {row['logits']:.1e}")
    rows.append({"way": "served, log-probabilities", **_served_difference(model, text, whole)})
    say(f"{rows[-1]['way']}: {rows[-1]['logits']:.1e}")
    points = [point for point in POINTS if point < len(text)] + [len(text)]
    return {
        "layers": len(model.stack.layers),
        "width": model.stack.d_model,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "tokens": len(text),
        "largest_logit": largest,
        "bits_a_byte": _bits(whole.logits, tokens[0]),
        "active": {name: float(active.float().mean()) for name, active in whole.active.items()},
        "rows": rows,
        "greedy": greedy(model, text, points),
    }


def _bits(logits: Tensor, tokens: Tensor) -> float:
    """Bits per byte over the sequence, which shows that the model is trained."""
    return float(torch.nn.functional.cross_entropy(logits[:-1].float(), tokens[1:])) / math.log(2)


@torch.no_grad()
def _parallel(model: LanguageModel, tokens: Tensor) -> tuple[Tensor, Mapping[str, Routing]]:
    out = model(tokens)
    return out.logits, out.routings


def _of(logits: Tensor, routings: Mapping[str, Routing]) -> Passed:
    return Passed(logits[0], {name: routing.active[0] for name, routing in routings.items()})


def _collect(chunks: Iterable[Passed]) -> Passed:
    each = list(chunks)
    logits = torch.cat([chunk.logits for chunk in each])
    return Passed(logits, {name: torch.cat([chunk.active[name] for chunk in each]) for name in each[0].active})


def _ways(model: LanguageModel) -> dict[str, Callable[[Tensor], Iterable[Passed]]]:
    """The ways to read ``tokens (1, N)``, by name."""
    hugging_face = from_model(model)
    assert isinstance(hugging_face, SMAForCausalLM)
    ways: dict[str, Callable[[Tensor], Iterable[Passed]]] = {
        f"in chunks of {CHUNK:,}": lambda tokens: _in_chunks(model, tokens, CHUNK),
        "in chunks of 1 to 64": lambda tokens: _in_chunks(model, tokens, 64, vary=True),
        "decoder, launched": lambda tokens: _stepwise(model, tokens, capture=False),
        f"Transformers, {CHUNK:,} at a time": lambda tokens: _by_transformers(hugging_face, tokens, CHUNK),
        "Transformers, token by token": lambda tokens: _by_transformers(hugging_face, tokens, 1),
    }
    if model.embedding.weight.is_cuda:
        ways["decoder, captured"] = lambda tokens: _stepwise(model, tokens, capture=True)
    if model.embedding.weight.dtype != torch.float64:
        ways["parallel in float64"] = lambda tokens: [_of(*_parallel(deepcopy(model).double(), tokens))]
    return ways


@torch.no_grad()
def _in_chunks(model: LanguageModel, tokens: Tensor, size: int, vary: bool = False) -> Iterator[Passed]:
    state, random, at = model.initial_state(1), Random(0), 0
    while at < tokens.shape[1]:
        length = random.randint(1, size) if vary else size
        out = model(tokens[:, at : at + length], state)
        state, at = out.state, at + length
        yield _of(out.logits, out.routings)


@torch.no_grad()
def _stepwise(model: LanguageModel, tokens: Tensor, capture: bool) -> Iterator[Passed]:
    decoder = Decoder(model, 1, capture=capture)
    decoder.acquire()
    for token in tokens[0]:
        logits = decoder.step(token[None]).clone()
        yield Passed(logits, {name: decision.active for name, decision in decoder.decisions.items()})


@torch.no_grad()
def _by_transformers(model: SMAForCausalLM, tokens: Tensor, size: int) -> Iterator[Passed]:
    cache = SMACache()
    for chunk in tokens.split(size, 1):  # type: ignore[no-untyped-call]
        out = model(chunk, cache=cache)  # without routings, single tokens are decoded in place
        assert out.logits is not None
        yield _of(out.logits, {})


def _difference(passed: Passed, whole: Passed) -> dict[str, Any]:
    """Largest differences, and how many decisions differ."""
    wide = torch.promote_types(passed.logits.dtype, torch.float32)
    apart = (passed.logits - whole.logits.to(wide)).abs()
    return {
        "logits": float(apart.max()),
        "along": _along(apart.amax(-1)),
        "relative": float((apart / whole.logits.to(wide).abs().clamp(min=1)).max()),
        "decisions": sum(int((active != whole.active[name]).sum()) for name, active in passed.active.items())
        if passed.active
        else None,
    }


def _served(model: LanguageModel, prompts: list[bytes], options: RequestOptions) -> list[Event]:
    """The events of a server's engine for prompts that are submitted together."""
    engine = Engine(model, Limits(slots=len(prompts) + 1, prefill_chunk=CHUNK, prompt_tokens=max(map(len, prompts))))
    events: list[Event] = []
    engine.submit(
        GenerationRequest(options, [(prompt, [Sampling(0.0, 1.0, Random(0))]) for prompt in prompts], events.extend)
    )
    while engine.in_flight:
        engine.round()
    failed = [event.message for event in events if isinstance(event, RequestFailed)]
    if failed:
        raise RuntimeError(f"served: {failed[0]}")
    return events


def _served_difference(model: LanguageModel, text: bytes, whole: Passed) -> dict[str, Any]:
    """The largest differences of the log-probabilities that a server reports for a prompt and its continuation."""
    events = _served(model, [text], RequestOptions(max_tokens=0, likelihoods=0, prompt_likelihoods=True))
    known = [
        each for event in events if isinstance(event, PromptPrefilled) for each in event.likelihoods if each is not None
    ]
    own = torch.tensor([each.own for each in known], dtype=torch.float64)
    after = torch.tensor([list(text[1:])]).T
    expected = whole.logits[:-1].double().cpu().log_softmax(-1).gather(-1, after).squeeze(-1)
    apart = (own - expected).abs()
    relative = apart / expected.abs().clamp(min=1)
    found = {"logits": float(apart.max()), "along": _along(apart), "relative": float(relative.max())}
    return {**found, "decisions": None}


def _along(apart: Tensor) -> list[float]:
    """The largest of so many differences ``(N,)`` up to each of :data:`POINTS`."""
    return [float(apart[:point].max()) for point in POINTS if point <= apart.shape[0]]


def greedy(model: LanguageModel, text: bytes, points: list[int]) -> list[dict[str, Any]]:
    """How many of the greedy tokens after each point are those of ``generate``, for every other way to generate.

    The server generates after all points at the same time. The parallel pass processes the generated tokens, and every
    one must be its most likely token.
    """
    device = model.embedding.weight.device
    prompts = [torch.tensor([list(text[:point])], device=device) for point in points]

    def ours(prompt: Tensor) -> list[int]:
        return generate(model, prompt, GREEDY, temperature=0.0, prefill_chunk=CHUNK)[0].tolist()

    hugging_face = from_model(model)
    events = _served(model, [text[:point] for point in points], RequestOptions(max_tokens=GREEDY))
    found = []
    for number, (point, prompt) in enumerate(zip(points, prompts, strict=True)):
        expected = ours(prompt)
        by_transformers = hugging_face.generate(prompt, max_new_tokens=GREEDY, do_sample=False)[0, point:].tolist()
        served = [event.token for event in events if isinstance(event, TokenGenerated) and event.sequence == number]
        continued = torch.cat([prompt, torch.tensor([expected], device=device)], 1)
        parallel = _parallel(model, continued)[0][0, point - 1 : -1].argmax(-1).tolist()
        texts = {"again": ours(prompt), "Transformers": by_transformers, "served": served, "parallel": parallel}
        same = {name: _same(each, expected) for name, each in texts.items()}
        found.append({"after": point, "tokens": GREEDY, "same": same, "text": bytes(expected).decode(errors="replace")})
    return found


def _same(one: list[int], other: list[int]) -> int:
    """Tokens until the first difference."""
    for count, (a, b) in enumerate(zip(one, other, strict=True)):
        if a != b:
            return count
    return len(one)


def show(result: dict[str, Any]) -> str:
    """Tables for the terminal."""
    tables = text_table(EXACT_HEAD, exact_cells(result)), text_table(GREEDY_HEAD, greedy_cells(result))
    return "\n".join(["", exact_title(result), *tables])
