"""``generate`` on its way: prompts in chunks, then one token at a time, in memory that changes in place."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from sma_models.inference import Decoder, Reader
from sma_models.language_model import LanguageModel
from sma_models.model_io import check_tokens, without_padding

if TYPE_CHECKING:
    from sma_models.integrations.hf.cache import StateLayer, Tokens
    from sma_models.stack import StackState


class Stepping:
    """A :class:`~sma_models.inference.Decoder` behind the caches of a model: it holds the state of one cache at a time,
    the *tenant*, and gives it back as a value as soon as somebody asks for it. And a
    :class:`~sma_models.inference.Reader` for the chunks of prompts.

    Args:
        model: as it was built. Steps know its parts and not what others put in their place or around them (adapters,
            quantised layers, hooks), so these are looked for.
    """

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._parts = _parts(model)
        self._decoder: Decoder | None = None
        self._reader: Reader | None = None
        self._weights: tuple[object, ...] = ()
        self._tenant: weakref.ref[StateLayer] | None = None
        self._last: weakref.ref[StateLayer] | None = None
        self._lock = threading.RLock()

    def __reduce__(self) -> tuple[type[Stepping], tuple[LanguageModel]]:
        return Stepping, (self._model,)  # a copy of the model decodes in memory of its own

    @property
    def captured(self) -> bool:
        """Whether steps are replayed from a CUDA graph."""
        return self._decoder is not None and self._decoder.captured

    @property
    def reads_captured(self) -> bool:
        """Whether chunks of prompts are."""
        return self._reader is not None and self._reader.captured

    def able(self) -> bool:
        """Whether steps would do what a call of the model does now."""
        model = self._model
        return (
            not model.training
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(model.embedding.weight.device.type)
            and not torch.compiler.is_compiling()
            and _parts(model) == self._parts
        )

    def step(self, layer: StateLayer, tokens: Tokens) -> Tensor:
        """Logits ``(B, 1, V)`` after one more column ``tokens``; the state of ``layer`` is then the one after it."""
        ids, valid = tokens.ids[:, 0], None if tokens.valid is None else tokens.valid[:, 0]
        with self._lock:
            decoder = self._enter(layer)
            device = decoder.logits.device
            ids = ids.to(device) if valid is None else ids.masked_fill(~valid, 0).to(device)
            logits: Tensor = decoder.step(ids, live=None if valid is None else valid.to(device))
            return logits[:, None].to(tokens.ids.device, copy=True)

    def read(self, chunk: Tokens, state: StackState, length: int, size: int) -> tuple[Tensor, StackState]:
        """Logits of the last ``length`` columns of a chunk of a prompt, whole if it has ``size`` columns, and the state
        after it.

        Raises:
            ShapeError: tokens of the wrong shape, dtype, device or range.
        """
        model = self._model
        ids = without_padding("language_model", chunk.ids, chunk.valid, model.embedding.weight)
        check_tokens("language_model", ids, model.vocab_size)
        with self._lock:
            self._look_at_weights()
            if self._reader is None or self._reader.chunk != size:
                self._reader = Reader(model, size)
            out = self._reader.read_chunk(ids, state, valid=chunk.valid)
            assert out.state is not None
            return model.logits(out.x[:, max(chunk.length - length, 0) :]), cast("StackState", out.state)

    def leave(self, layer: StateLayer) -> None:
        """Give a tenant its state back; nothing happens to one who has it already."""
        with self._lock:
            if self._decoder is not None and self._is_tenant(layer):
                layer.move_out(self._decoder.read_all(range(self._decoder.slots)))
                self._tenant = None

    def forget(self, layer: StateLayer) -> None:
        """A tenant's state is of no use any more."""
        with self._lock:
            if self._is_tenant(layer):
                self._tenant = None

    def release(self) -> None:
        """Let all memory go; a tenant gets its state back."""
        with self._lock:
            self._evict()
            self._decoder = self._reader = None

    def _is_tenant(self, layer: StateLayer) -> bool:
        return self._tenant is not None and self._tenant() is layer

    def _enter(self, layer: StateLayer) -> Decoder:
        if self._decoder is not None and self._is_tenant(layer):
            return self._decoder
        state = layer.state
        assert state is not None
        self._evict()
        self._look_at_weights()
        if self._decoder is None or self._decoder.slots != layer.batch_size:
            self._decoder = None  # its memory goes before that of the next one comes
            self._decoder = Decoder(self._model, layer.batch_size)
            self._decoder.resume(state)
        else:
            if self._last is None or self._last() is not layer:
                self._decoder.refresh()  # weights may have changed where they are
            self._decoder.write_all(range(layer.batch_size), state)
        self._tenant = self._last = weakref.ref(layer)
        layer.move_in(self)
        return self._decoder

    def _evict(self) -> None:
        other = None if self._tenant is None else self._tenant()
        if other is not None:
            self.leave(other)

    def _look_at_weights(self) -> None:
        """Graphs know the weights by where they lie."""
        weights = tuple((each.data_ptr(), each.dtype, each.device) for each in self._model.parameters())
        if weights != self._weights:
            self.release()
            self._weights = weights


def _parts(model: nn.Module) -> list[tuple[type, bool]]:
    """What a model is made of, and whether somebody listens to a part or has put another call in its place."""
    return [
        (type(part), bool(part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__))
        for part in model.modules()
    ]
