"""The cache of ``generate``: the streaming state of the whole model, bounded in size."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from sma.errors import StreamingError
from sma_models.integrations.hf.shared_decoder import SharedDecoder
from sma_models.integrations.hf.token_batch import TokenBatch
from sma_models.stack import StackState

MOST_PAST = 256
"""Tokens that a recording cache can take back, more than any draft has."""


class _Call(NamedTuple):
    """A call of the model: the state before it, and its tokens."""

    before: StackState
    tokens: TokenBatch


_Kept = TypeVar("_Kept", StackState, TokenBatch)


def _kept(value: _Kept) -> _Kept:
    """What a cache keeps. Made in inference mode, it is copied: later calls may take gradients, or run without it."""
    if not torch.is_inference_mode_enabled():
        return value
    with torch.inference_mode(False):
        return value.map(torch.clone)


class StateLayer(CacheLayerMixin):
    """The state of all blocks, as the one layer of a :class:`SMACache`.

    While tokens come one at a time, the state is in the memory of a
    :class:`~sma_models.integrations.hf.shared_decoder.SharedDecoder`.

    Attributes:
        state: after all processed tokens; None before the first.
        ahead: tokens that a rollback left to be processed again; the next call of the model begins with them.
        batch_size: sequences, -1 before the first call.
        record_past: whether the last calls are recorded, so that :meth:`crop` can undo them.
    """

    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self._state: StackState | None = None
        self._decoder: SharedDecoder | None = None
        self.ahead: TokenBatch | None = None
        self.batch_size = -1
        self.record_past = False
        self._length = 0
        self._past: deque[_Call] = deque()

    @property
    def state(self) -> StackState | None:
        decoder = self._decoder
        if decoder is not None:
            decoder.give_back(self)
        return self._state

    @state.setter
    def state(self, value: StackState | None) -> None:
        decoder = self._decoder
        if decoder is not None:
            decoder.forget(self)
        self._state, self._decoder = None if value is None else _kept(value), None

    def lend(self, decoder: SharedDecoder) -> None:
        """The state is in the memory of a decoder from now on, and changes in place."""
        self._decoder = decoder
        self._state = None

    def take(self, state: StackState) -> None:
        """The state is a value again."""
        self._state = state
        self._decoder = None

    def __getstate__(self) -> dict[str, Any]:
        decoder = self._decoder
        if decoder is not None:
            decoder.give_back(self)
        return self.__dict__.copy()

    def step(self, decoder: SharedDecoder, tokens: TokenBatch) -> Tensor:
        """Logits ``(B, 1, V)`` after one more column."""
        logits = decoder.step(self, tokens)
        self._length += 1
        return logits

    def can_step(self, tokens: TokenBatch) -> bool:
        """Whether ``tokens`` are one more column after the state, with nothing else to do."""
        there = self._decoder is not None or self._state is not None
        fits = tokens.ids.dim() == 2 and tokens.ids.shape == (self.batch_size, 1)
        return there and fits and self.ahead is None and not self.record_past

    def record(self, before: StackState, tokens: TokenBatch, after: StackState) -> None:
        """Record a call of the model with ``tokens``, which begin with those that were ``ahead``."""
        again = 0 if self.ahead is None else self.ahead.length
        self._length += tokens.length - again
        self.state, self.ahead, self.batch_size, self.is_initialized = after, None, tokens.ids.shape[0], True
        if self.record_past:
            self._past.append(_Call(_kept(before), _kept(tokens)))
            while len(self._past) > 1 and sum(call.tokens.length for call in self._past) > MOST_PAST:
                self._past.popleft()

    def set_state(self, state: StackState, batch_size: int, length: int) -> None:
        """Continue from a state after ``length`` columns of ``batch_size`` sequences."""
        self.state, self.batch_size, self._length, self.is_initialized = state, batch_size, length, True

    def activate_past_recording(self) -> None:
        """Record calls from now on. States are values, so it is enough to keep them."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` columns; 0 only deletes the records.

        If a call had more columns than that, the state before the call is restored, and the next call processes the
        remaining columns again.

        Raises:
            StreamingError: the number is positive, or these columns were not recorded.
        """
        if tokens_to_remove > 0:
            raise StreamingError(f"crop: must be given minus the number of tokens to remove, got {tokens_to_remove}")
        remove, past, state, ahead = -tokens_to_remove, self._past, self.state, self.ahead
        if remove == 0:
            past.clear()
            return
        recorded = sum(
            tokens.length for tokens in (*(call.tokens for call in past), *([] if ahead is None else [ahead]))
        )
        if remove > recorded:
            raise StreamingError(
                f"crop: at most the {recorded} tokens recorded since activate_past_recording() can go, got {remove}"
            )
        self._length -= remove
        while remove:
            if ahead is None:
                state, ahead = past.pop()
            keep = max(ahead.length - remove, 0)
            remove -= ahead.length - keep
            ahead = ahead.first(keep)
        self.state, self.ahead = state, ahead

    def reset(self) -> None:
        """Back to the beginning of a stream."""
        self.state, self.ahead, self.batch_size, self.is_initialized, self._length = None, None, -1, False, 0
        self._past.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows ``beam_idx (B',)`` of the batch, as beam search asks for; a row may occur several times."""

        def rows(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, beam_idx.to(tensor.device))

        if self.state is not None:
            self.state, self.batch_size = self.state.map(rows), beam_idx.shape[0]
        self.ahead = None if self.ahead is None else self.ahead.map(rows)
        self._past = deque(_Call(before.map(rows), tokens.map(rows)) for before, tokens in self._past)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        if self.state is not None:
            self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows: numbers, or a mask."""
        if self.state is not None:
            self.reorder_cache(indices.nonzero().squeeze(-1) if indices.dtype == torch.bool else indices)

    def get_seq_length(self) -> int:
        """Columns processed, padding included."""
        return self._length

    def get_max_length(self) -> int:
        """-1: there is no maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of an attention mask, and the first of them."""
        return self._length + query_length, 0

    def offload(self) -> None:
        """Move the state to the CPU."""
        self.state = None if self.state is None else self.state.to("cpu")

    def prefetch(self) -> None:
        """Nothing: the model moves the state to its own device."""

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Refuse keys and values: the model makes its own state.

        Raises:
            StreamingError: always.
        """
        raise StreamingError(
            "SMACache: holds the state of a model of this library, not keys and values; let the model update it"
        )

    update = lazy_initialization


class SMACache(Cache):
    """Streaming state of a batch, which does not grow with the sequences.

    ``generate`` makes one by itself, or continues from one that it is given. ``copy.deepcopy`` copies a cache, so a
    prompt that many sequences share is prefilled once.

    Example:
        >>> from sma_models.integrations.hf import SMAConfig, SMAForCausalLM
        >>> model = SMAForCausalLM(SMAConfig.of("seqboat_small_lm", "d_model=16", "n_layers=2")).eval()
        >>> cache = model(torch.randint(256, (1, 30)), use_cache=True).cache
        >>> size, cache = cache.nbytes, model(torch.randint(256, (1, 300)), cache=cache).cache
        >>> cache.get_seq_length(), cache.nbytes == size
        (330, True)
    """

    def __init__(self) -> None:
        super().__init__(layers=[StateLayer()])

    @classmethod
    def of(cls, state: StackState, length: int) -> SMACache:
        """A cache that continues from a state, for instance one from a file.

        Args:
            state: of a batch; it is not copied.
            length: columns that were processed, padding included, as :meth:`get_seq_length` returned.

        Raises:
            StreamingError: the state holds nothing.
        """
        tensors = state.tensors()
        if not tensors:
            raise StreamingError("state: holds no tensor")
        cache = cls()
        cache.layer.set_state(state, tensors[0].shape[0], length)
        return cache

    @property
    def layer(self) -> StateLayer:
        """The one layer."""
        layer = self.layers[0]
        assert isinstance(layer, StateLayer)
        return layer

    @property
    def state(self) -> StackState | None:
        """The state after all tokens that the model has processed; None before the first."""
        return self.layer.state

    @property
    def nbytes(self) -> int:
        """Size of the state in bytes."""
        return 0 if self.state is None else self.state.nbytes
