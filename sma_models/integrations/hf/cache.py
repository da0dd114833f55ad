"""What ``generate`` carries from call to call: the streaming state of the whole model, bounded in size."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from sma.errors import StreamingError
from sma_models.integrations.hf.stepping import Stepping
from sma_models.stack import StackState

MOST_PAST = 256
"""Tokens that a recording cache can take back; further back lies too far for any draft."""


class Tokens(NamedTuple):
    """Columns of a batch: ``ids (B, L)`` and ``valid (B, L)``, None when all are real tokens."""

    ids: Tensor
    valid: Tensor | None

    @property
    def length(self) -> int:
        """L."""
        return self.ids.shape[1]

    def map(self, fn: Callable[[Tensor], Tensor]) -> Tokens:
        """``fn`` applied to both."""
        return Tokens(fn(self.ids), None if self.valid is None else fn(self.valid))

    def first(self, count: int) -> Tokens | None:
        """The first ``count`` columns, None for none."""
        return self.map(lambda columns: columns[:, :count]) if count else None

    def split(self, size: int) -> list[Tokens]:
        """Parts of ``size`` columns, the last one shorter; one at least."""
        ids = self.ids.split(size, 1)  # type: ignore[no-untyped-call]
        if self.valid is None:
            return [Tokens(each, None) for each in ids]
        return list(map(Tokens, ids, self.valid.split(size, 1)))  # type: ignore[no-untyped-call]

    def then(self, more: Tokens) -> Tokens:
        """Both, one after the other."""
        ids = torch.cat([self.ids, more.ids], 1)
        if self.valid is None and more.valid is None:
            return Tokens(ids, None)
        masks = [
            torch.ones_like(each.ids, dtype=torch.bool) if each.valid is None else each.valid for each in (self, more)
        ]
        return Tokens(ids, torch.cat(masks, 1))


class _Read(NamedTuple):
    """One call of the model: the state before it, and what it read."""

    before: StackState
    tokens: Tokens


class StateLayer(CacheLayerMixin):
    """The state of all blocks, as the one layer of a :class:`SMACache`. While tokens come one at a time it lies in the
    memory of a :class:`~sma_models.integrations.hf.stepping.Stepping`.

    Attributes:
        state: after all tokens read; None before the first.
        ahead: tokens that a rollback left to be read again; the next call of the model reads them first.
        batch_size: sequences, -1 before the first call.
        record_past: whether the last reads are remembered, so that :meth:`crop` can undo them.
    """

    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self._state: StackState | None = None
        self._home: Stepping | None = None
        self.ahead: Tokens | None = None
        self.batch_size = -1
        self.record_past = False
        self._length = 0
        self._past: deque[_Read] = deque()

    @property
    def state(self) -> StackState | None:
        home = self._home
        if home is not None:
            home.leave(self)
        return self._state

    @state.setter
    def state(self, value: StackState | None) -> None:
        home = self._home
        if home is not None:
            home.forget(self)
        self._state, self._home = value, None

    def move_in(self, home: Stepping) -> None:
        """The state lies there from now on, and changes in place."""
        self._home = home
        self._state = None

    def move_out(self, state: StackState) -> None:
        """The state is a value again."""
        self._state = state
        self._home = None

    def __getstate__(self) -> dict[str, Any]:
        home = self._home
        if home is not None:
            home.leave(self)
        return self.__dict__.copy()

    def step(self, stepping: Stepping, tokens: Tokens) -> Tensor:
        """Logits ``(B, 1, V)`` after one more column."""
        logits = stepping.step(self, tokens)
        self._length += 1
        return logits

    def steps(self, tokens: Tokens) -> bool:
        """Whether one more column is all there is to do."""
        there = self._home is not None or self._state is not None
        fits = tokens.ids.dim() == 2 and tokens.ids.shape == (self.batch_size, 1)
        return there and fits and self.ahead is None and not self.record_past

    def read(self, before: StackState, tokens: Tokens, after: StackState) -> None:
        """Take note of one call of the model, which has read ``tokens``, with those that were ``ahead`` in front."""
        again = 0 if self.ahead is None else self.ahead.length
        self._length += tokens.length - again
        self.state, self.ahead, self.batch_size, self.is_initialized = after, None, tokens.ids.shape[0], True
        if self.record_past:
            self._past.append(_Read(before, tokens))
            while len(self._past) > 1 and sum(read.tokens.length for read in self._past) > MOST_PAST:
                self._past.popleft()

    def go_on(self, state: StackState, batch_size: int, length: int) -> None:
        """Stand behind ``length`` columns of ``batch_size`` sequences."""
        self.state, self.batch_size, self._length, self.is_initialized = state, batch_size, length, True

    def activate_past_recording(self) -> None:
        """Remember reads from now on. A state is a value, so all it takes is to keep it."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` columns; 0 only forgets the past.

        Where a call has read more than that at once, the state before it comes back, and what is to stay of its tokens
        is read again with the next ones.

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
            tokens.length for tokens in (*(read.tokens for read in past), *([] if ahead is None else [ahead]))
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
        """Forget everything."""
        self.state, self.ahead, self.batch_size, self.is_initialized, self._length = None, None, -1, False, 0
        self._past.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows ``beam_idx (B',)`` of the batch, as beam search asks for; a row may occur several times."""

        def rows(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, beam_idx.to(tensor.device))

        if self.state is not None:
            self.state, self.batch_size = self.state.map(rows), beam_idx.shape[0]
        self.ahead = None if self.ahead is None else self.ahead.map(rows)
        self._past = deque(_Read(before.map(rows), tokens.map(rows)) for before, tokens in self._past)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times."""
        if self.state is not None:
            self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows: numbers, or a mask."""
        if self.state is not None:
            self.reorder_cache(indices.nonzero().squeeze(-1) if indices.dtype == torch.bool else indices)

    def get_seq_length(self) -> int:
        """Columns read, padding included."""
        return self._length

    def get_max_length(self) -> int:
        """-1: there is no most."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of an attention mask, and the first of them."""
        return self._length + query_length, 0

    def offload(self) -> None:
        """Move the state to the CPU."""
        self.state = None if self.state is None else self.state.to("cpu")

    def prefetch(self) -> None:
        """Nothing: the model moves the state to where it computes."""

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Refuse keys and values: the model makes its own state.

        Raises:
            StreamingError: always.
        """
        raise StreamingError("SMACache: holds the state of a model of this library, no keys and values")

    update = lazy_initialization


class SMACache(Cache):
    """Streaming state of a batch, which does not grow with the text.

    ``generate`` makes one by itself. One that is passed in is gone on from, and can be copied by ``copy.deepcopy``:
    a prompt that many texts share is read once.

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
        """A cache that goes on from a state, for instance from one that was kept in a file.

        Args:
            state: of a batch; it is used as it is.
            length: columns that were read, padding included, as :meth:`get_seq_length` told.

        Raises:
            StreamingError: the state holds nothing.
        """
        tensors = state.tensors()
        if not tensors:
            raise StreamingError("state: holds no tensor")
        cache = cls()
        cache.layer.go_on(state, tensors[0].shape[0], length)
        return cache

    @property
    def layer(self) -> StateLayer:
        """The one layer."""
        layer = self.layers[0]
        assert isinstance(layer, StateLayer)
        return layer

    @property
    def state(self) -> StackState | None:
        """The state after all tokens that the model has read; None before the first."""
        return self.layer.state

    @property
    def nbytes(self) -> int:
        """Size of the state in bytes."""
        return 0 if self.state is None else self.state.nbytes
