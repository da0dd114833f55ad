"""Text from a language model, token by token, at constant memory and constant cost per token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sma.errors import ConfigError
from sma_models.heads import LanguageModel


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token per row.

    Args:
        logits: ``(B, V)``.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw among the k most likely only.
        top_p: draw among the fewest tokens that hold this much probability only.
        generator: source of randomness, on the device of the logits.

    Returns:
        ``(B,)`` int64.

    Raises:
        ConfigError: an argument is out of range.
    """
    if temperature < 0:
        raise ConfigError(f"temperature: must not be negative, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k: must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p: must lie in (0, 1], got {top_p}")
    if temperature == 0:
        return logits.argmax(-1)
    probability = torch.softmax(logits.float() / temperature, -1)
    ranked, order = torch.sort(probability, dim=-1, descending=True, stable=True)
    keep = torch.ones_like(ranked, dtype=torch.bool)
    if top_k is not None:
        keep[:, top_k:] = False
    if top_p is not None:
        keep &= ranked.cumsum(-1) - ranked < top_p
    drawn = torch.multinomial(ranked * keep, 1, generator=generator)
    return order.gather(-1, drawn).squeeze(-1)


@torch.no_grad()
def stream(
    model: LanguageModel,
    prompt: Tensor,
    *,
    valid: Tensor | None = None,
    prefill_chunk: int = 2048,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield one new token ``(B,)`` per row, for ever; take as many as you want.

    Args:
        model: in evaluation mode, or dropout will act.
        prompt: ``(B, L)`` tokens, L at least 1.
        valid: ``(B, L)`` bool, True on real tokens; every row needs one. Pad prompts on either side.
        prefill_chunk: the prompt is read in chunks of this many tokens, so memory does not grow with it.
        temperature: as for :func:`sample`, like the rest.
        top_k: see there.
        top_p: see there.
        generator: see there.

    Raises:
        ConfigError: the prompt is empty or a row of it is all padding.
        StreamingError: the model cannot stream.
    """
    if prompt.dim() != 2 or prompt.shape[1] == 0 or (valid is not None and not bool(valid.any(1).all())):
        raise ConfigError(f"prompt: every row needs at least one real token, got shape {tuple(prompt.shape)}")
    state = model.initial_state(prompt.shape[0])
    last = torch.zeros(prompt.shape[0], model.vocab_size, dtype=model.embedding.weight.dtype, device=prompt.device)
    for start in range(0, prompt.shape[1], prefill_chunk):
        chunk = slice(start, start + prefill_chunk)
        mask = None if valid is None else valid[:, chunk]
        out = model(prompt[:, chunk], state, valid=mask)
        assert out.state is not None
        state = out.state
        last = _last_logits(out.logits, mask, last)
    while True:
        token = sample(last, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        yield token
        out = model(token[:, None], state)
        state, last = out.state, out.logits[:, -1]


def _last_logits(logits: Tensor, valid: Tensor | None, before: Tensor) -> Tensor:
    """The logits at the last real token of each row; ``before`` where the chunk holds none."""
    if valid is None:
        return logits[:, -1]
    column = valid.shape[1] - 1 - valid.flip(1).int().argmax(1)
    found = logits[torch.arange(logits.shape[0], device=logits.device), column].to(before.dtype)
    return torch.where(valid.any(1, keepdim=True), found, before)


def generate(model: LanguageModel, prompt: Tensor, max_new_tokens: int, **options: object) -> Tensor:
    """The ``max_new_tokens`` tokens that follow each prompt, ``(B, max_new_tokens)``; options as for :func:`stream`.

    Example:
        >>> generate(model, torch.tensor([[72, 101]]), 16, temperature=0.8)         # doctest: +SKIP
    """
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens: must not be negative, got {max_new_tokens}")
    tokens = stream(model, prompt, **options)  # type: ignore[arg-type]
    drawn = [next(tokens) for _ in range(max_new_tokens)]
    return torch.stack(drawn, 1) if drawn else prompt[:, :0]
