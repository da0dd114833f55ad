"""Prefill of several requests in one pass: a chunk of each prompt is a row of a batch of fixed shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sma.errors import ConfigError
from sma.interfaces import BlockOutput
from sma.ops.backend import without_autocast
from sma.routing import Routing
from sma.runtime.captured_function import WARMUP, CapturedFunction, copy_all
from sma.state import State
from sma_models.embeddings import like_of
from sma_models.inference.captured_chunks import MAX_TOKENS, ChunkBuffers, captured_columns, copied_states
from sma_models.inference.fixed_capacity import with_fixed_rows
from sma_models.inference.prefiller import Prefiller
from sma_models.language_model import LanguageModel
from sma_models.stack import StackState


class BatchShape(NamedTuple):
    """The shape of one pass: chunks of up to ``columns`` tokens, of up to ``rows`` prompts."""

    columns: int
    rows: int


class PrefilledChunk(NamedTuple):
    """The result of :meth:`BatchPrefiller.prefill` for a chunk of one prompt.

    Attributes:
        x: ``(1, L, D)``, the output of the model's stack; the next call overwrites it, as it does the routings.
        state: after the chunk.
        logits: ``(1, V)`` of the token after it.
        routings: of the layers by their names; empty where they were not asked for.
    """

    x: Tensor
    state: StackState
    logits: Tensor
    routings: Mapping[str, Routing]


class BatchPrefiller:
    """Prefills chunks of several single prompts in one pass, as a CUDA graph.

    Where nothing can be captured (:attr:`uncaptured`), or a pass would have too many tokens, each chunk is a pass of
    its own, by a :class:`~sma_models.inference.prefiller.Prefiller`.

    Args:
        model: in evaluation mode. Its weights are used where they lie, and may change in place.
        chunk: how many tokens of a prompt are prefilled at once.
        rows: how many prompts a pass over whole chunks holds. A pass over a quarter of the columns holds twice as many,
            and so on.
        capture: False never captures a graph.

    Attributes:
        rows: the same; 1 where each chunk is a pass of its own.
        shapes: of the passes, the fewest columns first.

    Raises:
        ConfigError: the chunk or ``rows`` is below 1.
    """

    def __init__(self, model: LanguageModel, chunk: int, *, rows: int, capture: bool = True) -> None:
        if rows < 1:
            raise ConfigError(f"rows: must be at least 1, got {rows}")
        self.model, self.chunk = model, chunk
        self._single, self._most_rows = Prefiller(model, chunk, capture=capture), rows
        self._prepare_capture()

    def _prepare_capture(self) -> None:
        chunk, rows = self.chunk, self._most_rows
        self.rows = 1 if self._single.uncaptured or rows * chunk > MAX_TOKENS else rows
        # A quarter of the columns, twice the rows: half the tokens, and not too many states to keep and to copy.
        columns = captured_columns(chunk) if self.rows > 1 else [chunk]
        self.shapes = [BatchShape(size, self.rows * math.isqrt(chunk // size)) for size in columns]
        self._passes: dict[BatchShape, _CapturedPass] = {}
        self._fixed: LanguageModel | None = None
        self._state_buffer: StackState | None = None

    @property
    def uncaptured(self) -> dict[str, str]:
        """Why passes are not captured; see :attr:`sma_models.inference.prefiller.Prefiller.uncaptured`."""
        failures = [each.graph.failure for each in self._passes.values() if each.graph.failure is not None]
        return self._single.uncaptured | ({"": failures[0]} if failures else {})

    @property
    def captured(self) -> bool:
        """Whether passes are replayed from CUDA graphs."""
        return self._single.captured or any(each.graph.ready for each in self._passes.values())

    def initial_state(self) -> StackState:
        """The state before the first token of a prompt. It is made once: states are values."""
        return self._single.initial_state()

    def warm_up(self) -> None:
        """Capture the graphs of all passes, so that no later call takes the time for it."""
        if self.rows == 1:
            self._single.warm_up()
            return
        for shape in self.shapes:
            tokens = torch.zeros(1, shape.columns, dtype=torch.int64, device=like_of(self.model.embedding).device)
            for _ in range(WARMUP + 1):
                self.prefill([tokens], [self.initial_state()])

    def shape_of(self, length: int) -> BatchShape:
        """The shape of the pass for a chunk of so many tokens. It depends on nothing but this length."""
        return next(shape for shape in self.shapes if shape.columns >= length)

    @torch.no_grad()
    def prefill(
        self, chunks: Sequence[Tensor], states: Sequence[StackState], *, routings: bool = True
    ) -> list[PrefilledChunk]:
        """Prefill chunks of several single prompts, those of one shape in one pass.

        A pass always computes all its rows and columns. So the result for one prompt does not depend on the others.

        Args:
            chunks: ``(1, L)`` each, L at most the chunk; for each shape at most its rows. All on one device, or on the
                CPU.
            states: before each chunk.
            routings: whether they are returned.

        Raises:
            ConfigError: there are more chunks of a shape than it has rows.
            StreamingError: a state is of another model, or of several sequences.
        """
        if self._single.notice_changes():
            self._prepare_capture()
        of_shape: dict[BatchShape, list[int]] = {}
        for i, chunk in enumerate(chunks):
            of_shape.setdefault(self.shape_of(chunk.shape[1]), []).append(i)
        for shape, those in of_shape.items():
            if len(those) > shape.rows:
                raise ConfigError(
                    f"chunks: must be at most {shape.rows} of up to {shape.columns} tokens, got {len(those)}"
                )
        if self.rows == 1:
            return [self._alone(*each) for each in zip(chunks, states, strict=True)]
        found: dict[int, PrefilledChunk] = {}
        for shape, those in of_shape.items():
            results = self._pass(shape).run([chunks[i] for i in those], [states[i] for i in those], routings=routings)
            found |= zip(those, results, strict=True)
        return [found[i] for i in range(len(chunks))]

    def _alone(self, chunk: Tensor, state: StackState) -> PrefilledChunk:
        out = self._single.forward_chunk(chunk.to(like_of(self.model.embedding).device), state)
        logits = self.model.logits(out.x[:, -1])
        return PrefilledChunk(out.x, cast("StackState", out.state), logits, out.routings)

    def _pass(self, shape: BatchShape) -> _CapturedPass:
        if shape not in self._passes:
            if self._fixed is None or self._state_buffer is None:
                self._fixed = with_fixed_rows(self.model)
                self._state_buffer = self.model.initial_state(self.shapes[0].rows)
            state = self._state_buffer.map(lambda tensor: tensor[: shape.rows])  # passes take turns in one buffer
            self._passes[shape] = _CapturedPass(self._fixed, shape, state)
        return self._passes[shape]


class _CapturedPass:
    """A pass over chunks of single prompts, a row each, as a CUDA graph.

    The time of the host for a chunk counts: views are made once, and all rows are copied together.
    """

    def __init__(self, model: LanguageModel, shape: BatchShape, state: StackState) -> None:
        self._buffers = ChunkBuffers(model, shape.columns, state, partial=True)
        self._rows = _rows(self._buffers.tensors, shape.rows)
        self._after: tuple[State | None, list[list[Tensor]]] = (None, [])
        self.graph: CapturedFunction[tuple[BlockOutput, Tensor]] = CapturedFunction(self._buffers.tokens.device)

    def run(self, chunks: Sequence[Tensor], states: Sequence[StackState], *, routings: bool) -> list[PrefilledChunk]:
        """See :meth:`BatchPrefiller.prefill`."""
        buffers, count = self._buffers, len(chunks)
        before = [buffers.tensors_of(state, 1) for state in states]
        assert buffers.lengths is not None
        lengths = [chunk.shape[1] for chunk in chunks]
        tokens = pad_sequence([chunk[0] for chunk in chunks], batch_first=True)
        buffers.tokens[:count, : tokens.shape[1]].copy_(tokens)
        buffers.lengths.copy_(torch.tensor([*lengths, *[0] * (len(self._rows) - count)]))
        copy_all(list(chain(*self._rows[:count])), list(chain(*before)))
        out, logits = self.graph.run(self._forward)
        own = cast("StackState", out.state)
        if self._after[0] is not own:  # every replay returns the same tensors
            self._after = own, _rows(own.tensors(), len(self._rows))
        values, logits = copied_states(own, self._after[1][:count]), logits[:count].clone()
        found = []
        for row, (length, state) in enumerate(zip(lengths, values, strict=True)):
            known = out.routings.items() if routings else ()
            of_row = {name: routing.map(_cut(row, length)) for name, routing in known}
            found.append(PrefilledChunk(_cut(row, length)(out.x), state, logits[row : row + 1], of_row))
        return found

    def _forward(self) -> tuple[BlockOutput, Tensor]:
        """The output of the stack, and the logits after the last token of each row; rows of no tokens mean nothing."""
        out, lengths = self._buffers.forward(), self._buffers.lengths
        assert lengths is not None
        last = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, out.x.shape[-1])
        with without_autocast(lengths.device):
            return out, self._buffers.model.logits(out.x.gather(1, last)[:, 0])


def _rows(tensors: Sequence[Tensor], count: int) -> list[list[Tensor]]:
    """For each row, a view of it in every tensor."""
    return [[tensor[row : row + 1] for tensor in tensors] for row in range(count)]


def _cut(row: int, length: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor[row : row + 1, :length]
