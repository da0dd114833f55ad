"""The copy of one state into a slot of a decoder, as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sma.runtime.captured_function import CapturedFunction, copy_all
from sma_models.language_model import LanguageModel
from sma_models.stack import StackState

WriteSlots = Callable[[Tensor, StackState, Tensor, Tensor | None], None]
"""Writes a state of n sequences into ``slots (n,)``: the slots, the state, the positions ``(n,)``, the logits."""


class CapturedSlotWrite:
    """Writes the state of one sequence into a slot: hundreds of small copies, as one graph.

    Args:
        model: that the states are of.
        logits: ``(S, V)`` of the decoder.
    """

    def __init__(self, model: LanguageModel, logits: Tensor) -> None:
        self._state = model.initial_state(1)
        self._buffers = self._state.tensors()
        self._dtypes = [each.dtype for each in self._buffers]
        self._slot, self._position = torch.zeros(2, 1, dtype=torch.int64, device=logits.device)
        self._logits = torch.zeros_like(logits[:1])
        self.graph: CapturedFunction[None] = CapturedFunction(logits.device)

    def fits(self, state: StackState) -> bool:
        """Whether the state is of one sequence, and no copy would round it."""
        tensors = state.tensors()
        return tensors[0].shape[0] == 1 and [each.dtype for each in tensors] == self._dtypes

    def run(self, write: WriteSlots, slot: int, state: StackState, position: Tensor, logits: Tensor | None) -> None:
        """Write a state into a slot by ``write`` of the decoder."""
        copy_all(self._buffers, state.tensors())
        self._slot.fill_(slot)
        self._position.copy_(position)
        if logits is None:
            self._logits.zero_()
        else:
            self._logits.copy_(logits.view_as(self._logits))
        self.graph.run(lambda: write(self._slot, self._state, self._position, self._logits))
