"""One chunk of a batch of prompts, as a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import cast

import torch
from torch import Tensor

from sma.errors import StreamingError
from sma.interfaces import BlockOutput
from sma.ops.backend import without_autocast
from sma.runtime.captured_function import CapturedFunction, copy_all
from sma.runtime.plain import watched_parts
from sma.state import misfit
from sma_models.embeddings import like_of
from sma_models.inference.fixed_capacity import why_not_fixed
from sma_models.language_model import LanguageModel
from sma_models.stack import StackState

MAX_TOKENS = 32_768
"""In a captured chunk, which has a row for every token. With more tokens the device is busy, and rows for inactive
tokens cost time.
"""
SMALLEST = 128
"""Columns of the smallest graph for less than a chunk. Each further graph has four times as many, the last a chunk."""


def captured_columns(chunk: int) -> list[int]:
    """How many columns the graphs have that hold up to ``chunk`` tokens of a prompt.

    Example:
        >>> captured_columns(2048)
        [128, 512, 2048]
    """
    size, sizes = SMALLEST, []
    while size < chunk:
        sizes.append(size)
        size *= 4
    return [*sizes, chunk]


def why_uncaptured(model: LanguageModel, capture: bool) -> dict[str, str]:
    """Why chunks of the model cannot be captured, by the name of the part, ``""`` for the whole; empty if they can."""
    device = like_of(model.embedding).device
    if not capture:
        return {"": "capture is False"}
    if device.type != "cuda":
        return {"": f"a CUDA graph needs a CUDA device, the model is on {device}"}
    if model.training:
        return {"": "the model is in training mode"}
    watched = {name: f"{reason}: a CUDA graph would not run them" for name, reason in watched_parts(model).items()}
    return watched | why_not_fixed(model)


class ChunkBuffers:
    """The inputs of a graph at fixed addresses: the tokens of a chunk, and the state before it.

    Args:
        model: with a fixed capacity.
        columns: of the chunk.
        state: whose tensors hold the state before the chunk.
        partial: whether fewer columns may be filled.
    """

    def __init__(self, model: LanguageModel, columns: int, state: StackState, *, partial: bool) -> None:
        self.model, self._state = model, state
        self._form, self.tensors = state.form(), state.tensors()
        device, batch = like_of(model.embedding).device, self.tensors[0].shape[0]
        self.tokens = torch.zeros(batch, columns, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device) if partial else None

    def tensors_of(self, state: StackState, batch: int) -> list[Tensor]:
        """The tensors of a state, in the order of those of the buffers.

        Raises:
            StreamingError: the state is of another model or batch.
        """
        tensors = state.tensors()
        if state.form() == self._form and all(each.shape[0] == batch for each in tensors):
            return tensors
        problem = misfit(self._state, state)
        if problem is not None:
            raise StreamingError(f"state: does not fit the model: {problem}")
        raise StreamingError(f"state: must be of {batch} sequences like the input, got {tensors[0].shape[0]}")

    def forward(self) -> BlockOutput:
        """The output of the model's stack for the buffers."""
        with without_autocast(self.tokens.device):
            features = self.model.embed(self.tokens)
            return self.model.stack(features, self._state, lengths=self.lengths)  # type: ignore[no-any-return]


class CapturedChunk:
    """A chunk of a batch of prompts, or a part of a chunk, as a CUDA graph; arguments as for :class:`ChunkBuffers`."""

    def __init__(self, model: LanguageModel, columns: int, state: StackState, *, partial: bool = False) -> None:
        self._buffers = ChunkBuffers(model, columns, state, partial=partial)
        self.graph: CapturedFunction[BlockOutput] = CapturedFunction(self._buffers.tokens.device)

    def run(self, tokens: Tensor, state: StackState) -> BlockOutput:
        """The output of the stack for ``tokens (B, L)`` after ``state``.

        Raises:
            StreamingError: the state is of another model or batch.
        """
        buffers, length = self._buffers, tokens.shape[1]
        before = buffers.tensors_of(state, buffers.tokens.shape[0])
        buffers.tokens[:, :length].copy_(tokens)  # columns behind them hold earlier tokens, which `lengths` excludes
        if buffers.lengths is not None:
            buffers.lengths.fill_(length)
        copy_all(buffers.tensors, before)
        out = self.graph.run(buffers.forward)
        own = cast("StackState", out.state)
        (state,) = copied_states(own, [own.tensors()])
        if length == out.x.shape[1]:
            return out._replace(state=state)
        routings = {name: routing.map(lambda each: each[:, :length]) for name, routing in out.routings.items()}
        return out._replace(x=out.x[:, :length], state=state, routings=routings)


def copied_states(form: StackState, states: Sequence[list[Tensor]]) -> list[StackState]:
    """A state of the given form for each list of tensors, with copies of them that no replay overwrites."""
    own = [[torch.empty_like(tensor) for tensor in state] for state in states]
    copy_all(list(chain(*own)), list(chain(*states)))
    return [form.with_tensors(tensors) for tensors in own]
