"""Prefill of a batch of prompts, in chunks, so that memory does not grow with their length."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from sma.errors import ConfigError
from sma.interfaces import BlockOutput
from sma.runtime.captured_function import WARMUP, CapturedFunction
from sma.runtime.plain import PartsWatch
from sma_models.embeddings import like_of
from sma_models.inference.captured_chunks import MAX_TOKENS, CapturedChunk, captured_columns, why_uncaptured
from sma_models.inference.fixed_capacity import with_fixed_rows
from sma_models.language_model import LanguageModel
from sma_models.model_io import check_tokens, without_padding
from sma_models.stack import StackState

_MAX_BATCH_SIZES = 4
"""That have a graph for whole chunks. Chunks of further batch sizes are launched eagerly."""


class Prefilled(NamedTuple):
    """The result of a prefill: the state after the prompts, and the logits ``(B, V)`` of each one's next token."""

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
    prompt = without_padding("prompt", prompt, valid, like_of(model.embedding))
    check_tokens("prompt", prompt, model.vocab_size)
    if prompt.shape[1] == 0 or (valid is not None and not bool(valid.any(1).all())):
        raise ConfigError(f"prompt: every row needs at least one real token, got shape {tuple(prompt.shape)}")
    return prompt


class Prefiller:
    """Runs prompts through the parallel model, in chunks, so that memory does not grow with their length.

    On a CUDA device the host takes far longer to launch a chunk than the device to compute it, because every layer
    synchronises with the device to learn how many tokens are active. There, chunks without padding have a row for every
    token in every layer and are captured as CUDA graphs, unless a part of the model prevents it (:attr:`uncaptured`).
    Whole chunks have a graph for each batch size. The rest of a single prompt is padded to one of a few lengths. The
    shape of a chunk alone decides how it is run, so results never depend on earlier calls. Chunks of more than 32,768
    tokens keep the device busy; they are launched eagerly, with rows for active tokens only.

    Args:
        model: in evaluation mode. Its weights are used where they lie, and may change in place.
        chunk: how many columns are prefilled at once.
        capture: False never captures a graph, and has rows for active tokens only.

    Raises:
        ConfigError: the chunk is below 1.
    """

    def __init__(self, model: LanguageModel, chunk: int = 2048, *, capture: bool = True) -> None:
        if chunk < 1:
            raise ConfigError(f"prefill_chunk: must be at least 1, got {chunk}")
        self.model, self.chunk, self._capture = model, chunk, capture
        self._initial: StackState | None = None
        self._prepare_capture()

    def _prepare_capture(self) -> None:
        """Decide whether chunks are captured, for the parts of the model as they are now."""
        self._why_not = why_uncaptured(self.model, self._capture)
        self._watch = None if self._why_not else PartsWatch(self.model)
        self._fixed: LanguageModel | None = None
        self._state_buffers: dict[int, StackState] = {}  # by batch size
        self._wholes: dict[int, CapturedChunk] = {}  # by batch size
        self._partials: dict[int, CapturedChunk] = {}  # by columns, of a single prompt

    def notice_changes(self) -> bool:
        """Forget what was captured if parts of the model were replaced, wrapped or hooked since; whether they were."""
        if self._watch is None or not self._watch.changed():
            return False
        self._prepare_capture()
        return True

    @property
    def uncaptured(self) -> dict[str, str]:
        """Why chunks are not captured, by the name of the part of the model that prevents it, ``""`` for the whole.

        Where a capture was tried and failed, the reason is CUDA's message.
        """
        failures = [graph.failure for graph in self._graphs() if graph.failure is not None]
        return self._why_not | ({"": failures[0]} if failures else {})

    @property
    def captured(self) -> bool:
        """Whether chunks are replayed from CUDA graphs."""
        return any(graph.ready for graph in self._graphs())

    def _graphs(self) -> list[CapturedFunction[BlockOutput]]:
        return [each.graph for each in (*self._wholes.values(), *self._partials.values())]

    def initial_state(self) -> StackState:
        """The state before the first token of a single prompt. It is made once: states are values."""
        if self._initial is None:
            self._initial = self.model.initial_state(1)
        return self._initial

    def warm_up(self) -> None:
        """Capture the graphs for single prompts, so that no later call takes the time for it."""
        if self._why_not:
            return
        partial = {min(size, self.chunk - 1) for size in captured_columns(self.chunk)} - {0}
        for length in [*sorted(partial), self.chunk]:
            tokens = torch.zeros(1, length, dtype=torch.int64, device=like_of(self.model.embedding).device)
            for _ in range(WARMUP + 1):
                self.forward_chunk(tokens, self.initial_state())

    @torch.no_grad()
    def prefill(self, prompt: Tensor, state: StackState | None = None, *, valid: Tensor | None = None) -> Prefilled:
        """Prefill prompts; arguments and errors as for :func:`prefill`."""
        prompt = check_prompt(self.model, prompt, valid, self.chunk)
        weight = like_of(self.model.embedding)
        if state is None:
            state = self.initial_state() if prompt.shape[0] == 1 else self.model.initial_state(prompt.shape[0])
        last = torch.zeros(prompt.shape[0], self.model.stack.d_model, dtype=weight.dtype, device=prompt.device)
        for start in range(0, prompt.shape[1], self.chunk):
            columns = slice(start, start + self.chunk)
            mask = None if valid is None else valid[:, columns]
            out = self.forward_chunk(prompt[:, columns], state, valid=mask)
            state, last = cast("StackState", out.state), _last(out.x, mask, last)
        return Prefilled(state, self.model.logits(last))

    @torch.no_grad()
    def forward_chunk(self, tokens: Tensor, state: StackState, *, valid: Tensor | None = None) -> BlockOutput:
        """Run the stack of the model on one chunk.

        Args:
            tokens: ``(B, L)``, L at most the chunk.
            state: before the chunk.
            valid: ``(B, L)`` bool, True on real tokens.

        Returns:
            The output of the stack. The next chunk overwrites its features and routings; its state is a value.
        """
        self.notice_changes()
        padded = valid is not None and not bool(valid.all())
        if self._why_not or padded or tokens.numel() > MAX_TOKENS:
            return self.model.stack(self.model.embed(tokens), state, valid=valid)  # type: ignore[no-any-return]
        batch, length = tokens.shape
        if length < self.chunk:
            if batch > 1:
                return self.model.stack(self.model.embed(tokens), state)  # type: ignore[no-any-return]
            return self._partial(length).run(tokens, state)
        fixed = self._with_fixed_rows()
        if batch not in self._wholes and len(self._wholes) < _MAX_BATCH_SIZES:
            self._wholes[batch] = CapturedChunk(fixed, length, self._state_buffer(batch))
        if batch in self._wholes:
            return self._wholes[batch].run(tokens, state)
        return fixed.stack(fixed.embed(tokens), state)  # type: ignore[no-any-return]

    def _partial(self, length: int) -> CapturedChunk:
        """The graph for a part of a chunk of a single prompt."""
        columns = next(size for size in captured_columns(self.chunk) if size >= length)
        if columns not in self._partials:
            fixed, state = self._with_fixed_rows(), self._state_buffer(1)
            self._partials[columns] = CapturedChunk(fixed, columns, state, partial=True)
        return self._partials[columns]

    def _with_fixed_rows(self) -> LanguageModel:
        if self._fixed is None:
            self._fixed = with_fixed_rows(self.model)
        return self._fixed

    def _state_buffer(self, batch: int) -> StackState:
        if batch not in self._state_buffers:
            self._state_buffers[batch] = self.model.initial_state(batch)
        return self._state_buffers[batch]


def prefill(
    model: LanguageModel,
    prompt: Tensor,
    state: StackState | None = None,
    *,
    valid: Tensor | None = None,
    chunk: int = 2048,
    capture: bool = True,
) -> Prefilled:
    """Run prompts through the parallel model, ``chunk`` tokens at a time. For many calls, keep a :class:`Prefiller`.

    Args:
        model: in evaluation mode.
        prompt: ``(B, L)`` tokens, L at least 1.
        state: before the prompt; None for the beginning of a stream.
        valid: ``(B, L)`` bool, True on real tokens, padding may lie anywhere; every row needs one.
        chunk: how many columns are prefilled at once.
        capture: False never captures a CUDA graph, see :class:`Prefiller`.

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
    return Prefiller(model, chunk, capture=capture).prefill(prompt, state, valid=valid)


def _last(features: Tensor, valid: Tensor | None, before: Tensor) -> Tensor:
    """The features at the last real token of each row; ``before`` where the chunk holds none."""
    if valid is None:
        return features[:, -1].to(before.dtype)
    column = valid.shape[1] - 1 - valid.flip(1).int().argmax(1)
    found = features[torch.arange(features.shape[0], device=features.device), column].to(before.dtype)
    return torch.where(valid.any(1, keepdim=True), found, before)
