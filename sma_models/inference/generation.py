"""Text from a language model, token by token, at constant memory and constant cost per token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from sma.errors import ConfigError
from sma_models.inference import Decoder
from sma_models.inference.prefiller import check_prompt
from sma_models.language_model import LanguageModel


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Refuse options of :func:`sample` that are out of range.

    Raises:
        ConfigError: which, and its value.
    """
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature: must be 0 or a positive number, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k: must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p: must lie in (0, 1], got {top_p}")


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
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(-1)
    # The largest becomes 0, so that no temperature is too small to divide by.
    probability = torch.softmax((logits - logits.amax(-1, keepdim=True)).float() / temperature, -1)
    ranked, order = torch.sort(probability, dim=-1, descending=True, stable=True)
    keep = torch.ones_like(ranked, dtype=torch.bool)
    if top_k is not None:
        keep[:, top_k:] = False
    if top_p is not None:
        keep &= ranked.cumsum(-1) - ranked < top_p
    drawn = torch.multinomial(ranked * keep, 1, generator=generator)
    return order.gather(-1, drawn).squeeze(-1)


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
    """Yield one new token ``(B,)`` per row, without end.

    Args:
        model: in evaluation mode.
        prompt: ``(B, L)`` tokens, L at least 1.
        valid: ``(B, L)`` bool, True on real tokens; every row needs one. Pad prompts on either side.
        prefill_chunk: the prompt is prefilled in chunks of this many tokens, so memory does not grow with it.
        temperature: as for :func:`sample`, like the rest.
        top_k: see there.
        top_p: see there.
        generator: see there.

    Raises:
        ConfigError: an option is out of range, the model is in training mode, the prompt is empty or a row of it is all
            padding.
        ShapeError: the prompt or ``valid`` have the wrong shape or dtype, or a token is not in the vocabulary.
        StreamingError: the model cannot stream.
    """
    check_sampling(temperature, top_k, top_p)
    prompt = check_prompt(model, prompt, valid, prefill_chunk)
    decoder = Decoder(model, prompt.shape[0], prefill_chunk=prefill_chunk)
    draw = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    return _stream(decoder, prompt, valid, draw)


def _stream(
    decoder: Decoder, prompt: Tensor, valid: Tensor | None, draw: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    decoder.join_all(prompt, valid=valid)
    while True:
        token = draw(decoder.logits)
        yield token
        decoder.step(token)


def generate(model: LanguageModel, prompt: Tensor, max_new_tokens: int, **options: object) -> Tensor:
    """The ``max_new_tokens`` tokens that follow each prompt, ``(B, max_new_tokens)``; options as for :func:`stream`.

    Raises:
        ConfigError: as for :func:`stream`, and for a negative number of tokens.

    Example:
        >>> import sma
        >>> model = sma.build("seqboat_small_lm", "d_model=16", "n_layers=2").eval()
        >>> generate(model, torch.tensor([[72, 101]]), 5, temperature=0.8).shape
        torch.Size([1, 5])
    """
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens: must not be negative, got {max_new_tokens}")
    tokens = stream(model, prompt, **options)  # type: ignore[arg-type]
    drawn = [next(tokens) for _ in range(max_new_tokens)]
    return torch.stack(drawn, 1) if drawn else prompt[:, :0]
