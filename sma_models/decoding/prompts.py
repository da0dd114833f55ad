"""Reading prompts, in chunks, so that memory does not grow with them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sma.errors import ConfigError
from sma_models.heads import LanguageModel, check_tokens, without_padding
from sma_models.stack import StackState


class Prefilled(NamedTuple):
    """What reading prompts gives: the state after them, and the logits ``(B, V)`` of each one's next token."""

    state: StackState
    logits: Tensor


def check_prompt(model: LanguageModel, prompt: Tensor, valid: Tensor | None, chunk: int) -> Tensor:
    """The prompts ``(B, L)`` with zeros at padding.

    Raises:
        ConfigError: the chunk is below 1, the prompt is empty or a row of it is all padding.
        ShapeError: the prompt or ``valid`` have the wrong shape or dtype, or a token is not in the vocabulary.
    """
    if chunk < 1:
        raise ConfigError(f"prefill_chunk: must be at least 1, got {chunk}")
    prompt = without_padding("prompt", prompt, valid, model.embedding.weight)
    check_tokens("prompt", prompt, model.vocab_size)
    if prompt.shape[1] == 0 or (valid is not None and not bool(valid.any(1).all())):
        raise ConfigError(f"prompt: every row needs at least one real token, got shape {tuple(prompt.shape)}")
    return prompt


@torch.no_grad()
def prefill(
    model: LanguageModel,
    prompt: Tensor,
    state: StackState | None = None,
    *,
    valid: Tensor | None = None,
    chunk: int = 2048,
) -> Prefilled:
    """Read prompts through the parallel path, ``chunk`` tokens at a time.

    Args:
        model: that reads.
        prompt: ``(B, L)`` tokens, L at least 1.
        state: to go on from; None for the beginning of a stream.
        valid: ``(B, L)`` bool, True on real tokens, padding may lie anywhere; every row needs one.
        chunk: how many columns are read at once.

    Raises:
        ConfigError: the chunk is below 1, the prompt is empty or a row of it is all padding.
        ShapeError: the prompt or ``valid`` have the wrong shape or dtype, or a token is not in the vocabulary.
        StreamingError: the model cannot stream, or the state does not fit.

    Example:
        >>> import sma
        >>> model = sma.build("seqboat_small_lm", "d_model=16", "n_layers=2").eval()
        >>> prefill(model, torch.tensor([[72, 101, 108]]), chunk=2).logits.shape
        torch.Size([1, 256])
    """
    prompt = check_prompt(model, prompt, valid, chunk)
    weight = model.embedding.weight
    state = model.initial_state(prompt.shape[0]) if state is None else state
    last = torch.zeros(prompt.shape[0], model.stack.d_model, dtype=weight.dtype, device=prompt.device)
    for start in range(0, prompt.shape[1], chunk):
        columns = slice(start, start + chunk)
        mask = None if valid is None else valid[:, columns]
        out = model.stack(model.embed(prompt[:, columns]), state, valid=mask)
        state, last = out.state, _last(out.x, mask, last)
    assert state is not None
    return Prefilled(state, model.logits(last))


def _last(features: Tensor, valid: Tensor | None, before: Tensor) -> Tensor:
    """The features at the last real token of each row; ``before`` where the chunk holds none."""
    if valid is None:
        return features[:, -1].to(before.dtype)
    column = valid.shape[1] - 1 - valid.flip(1).int().argmax(1)
    found = features[torch.arange(features.shape[0], device=features.device), column].to(before.dtype)
    return torch.where(valid.any(1, keepdim=True), found, before)
