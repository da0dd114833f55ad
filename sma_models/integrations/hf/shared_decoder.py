"""The decoding of ``generate``: prompts in chunks, then one token at a time, in memory that changes in place."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from sma_models.inference import Decoder, Prefiller
from sma_models.integrations.hf.token_batch import TokenBatch
from sma_models.integrations.hf.weights_watch import WeightsWatch
from sma_models.language_model import LanguageModel
from sma_models.model_io import check_tokens, without_padding
from sma_models.stack import StackState


class StateOwner(Protocol):
    """What owns a state, and lends it to a :class:`SharedDecoder`: the layer of a cache."""

    batch_size: int

    @property
    def state(self) -> StackState | None:
        """As a value, given back by the decoder if necessary."""

    def lend(self, decoder: SharedDecoder) -> None:
        """The state is in the memory of the decoder from now on."""

    def take(self, state: StackState) -> None:
        """The state is a value again."""


class SharedDecoder:
    """One :class:`~sma_models.inference.Decoder` for all caches of a model.

    It holds the state of one cache at a time. It gives the state back as a value when the state is asked for, or when
    another cache takes a step. A :class:`~sma_models.inference.Prefiller` runs the chunks of prompts.

    Args:
        model: as it was built. Steps do not run what others put in the place of its parts or around them (adapters,
            quantised layers, hooks); :meth:`applies` finds these.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._parts = _parts(model)
        self._decoder: Decoder | None = None
        self._prefiller: Prefiller | None = None
        self._watch: WeightsWatch | None = None
        self._owner: weakref.ref[StateOwner] | None = None
        self._last: weakref.ref[StateOwner] | None = None
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[type[SharedDecoder], tuple[LanguageModel]]:
        return SharedDecoder, (self._model,)  # a copy of the model decodes in memory of its own

    @property
    def captured(self) -> bool:
        """Whether steps are replayed from a CUDA graph."""
        return self._decoder is not None and self._decoder.captured

    @property
    def prefill_captured(self) -> bool:
        """Whether chunks of prompts are replayed from CUDA graphs."""
        return self._prefiller is not None and self._prefiller.captured

    def applies(self) -> bool:
        """Whether steps have the same result as a call of the model now."""
        model = self._model
        return (
            not model.training
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(model.embedding.weight.device.type)
            and not torch.compiler.is_compiling()
            and _parts(model) == self._parts
        )

    def step(self, owner: StateOwner, tokens: TokenBatch) -> Tensor:
        """Logits ``(B, 1, V)`` after one more column ``tokens``; the state of ``owner`` is then the one after it."""
        ids, valid = tokens.ids[:, 0], None if tokens.valid is None else tokens.valid[:, 0]
        with self._locked():
            decoder = self._borrow(owner)
            device = decoder.logits.device
            ids = ids.to(device) if valid is None else ids.masked_fill(~valid, 0).to(device)
            logits: Tensor = decoder.step(ids, live=None if valid is None else valid.to(device))
            return logits[:, None].to(tokens.ids.device, copy=True)

    def prefill(self, tokens: TokenBatch, state: StackState, length: int, chunk: int) -> tuple[Tensor, StackState]:
        """Prefill a chunk of prompts, whole if it has ``chunk`` columns.

        Returns:
            Logits ``(B, length, V)`` of its last columns, and the state after it.

        Raises:
            ShapeError: tokens of the wrong shape, dtype, device or range.
        """
        model = self._model
        ids = without_padding("language_model", tokens.ids, tokens.valid, model.embedding.weight)
        check_tokens("language_model", ids, model.vocab_size)
        with self._locked():
            self._notice_weights()
            if self._prefiller is None or self._prefiller.chunk != chunk:
                self._prefiller = Prefiller(model, chunk)
            out = self._prefiller.forward_chunk(ids, state, valid=tokens.valid)
            assert out.state is not None
            return model.logits(out.x[:, max(tokens.length - length, 0) :]), cast("StackState", out.state)

    def give_back(self, owner: StateOwner) -> None:
        """Give an owner its state back; one that has its state keeps it."""
        with self._locked():
            if self._decoder is not None and self._holds_state_of(owner):
                owner.take(self._decoder.read_all(range(self._decoder.slots)))
                self._owner = None

    def forget(self, owner: StateOwner) -> None:
        """Discard the state of an owner."""
        with self._lock:
            if self._holds_state_of(owner):
                self._owner = None

    def release(self) -> None:
        """Free all memory; the owner of the state gets it back."""
        with self._locked():
            self._evict()
            self._decoder = self._prefiller = None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One thread at a time, outside inference mode: later calls write to the memory that is allocated here."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            yield

    def _holds_state_of(self, owner: StateOwner) -> bool:
        return self._owner is not None and self._owner() is owner

    def _borrow(self, owner: StateOwner) -> Decoder:
        """The decoder, with the state of the owner in it."""
        self._notice_weights()
        if self._decoder is not None and self._holds_state_of(owner):
            return self._decoder
        state = owner.state
        assert state is not None
        self._evict()
        if self._decoder is None or self._decoder.slots != owner.batch_size:
            self._decoder = None  # frees its memory before the next one takes its own
            self._decoder = Decoder(self._model, owner.batch_size)
            self._decoder.resume(state)
        else:
            if self._last is None or self._last() is not owner:
                self._decoder.refresh()  # weights may have changed through `.data`
            self._decoder.write_all(range(owner.batch_size), state)
        self._owner = self._last = weakref.ref(owner)
        owner.lend(self)
        return self._decoder

    def _evict(self) -> None:
        other = None if self._owner is None else self._owner()
        if other is not None:
            self.give_back(other)

    def _notice_weights(self) -> None:
        """Free the memory and the graphs if weights have moved, since graphs hold their addresses; and derive anew what
        depends on values that have changed.
        """
        news = "moved" if self._watch is None else self._watch.look()
        if news == "moved":
            self.release()
            self._watch = WeightsWatch(self._model)
        elif news == "changed" and self._decoder is not None:
            self._decoder.refresh()


def _parts(model: nn.Module) -> list[tuple[type, bool]]:
    """The class of each part, and whether it has hooks or a ``forward`` of the instance."""
    return [
        (type(part), bool(part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__))
        for part in model.modules()
    ]
